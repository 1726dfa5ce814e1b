variable "project_id" {
  type = string
}

variable "region" {
  type = string
}

variable "github_repository_id" {
  type = string
}

# Its form, and what it means, is the module's.
variable "access" {
  type    = any
  default = {}
}
