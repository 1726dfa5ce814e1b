variable "env" {
  description = "dev, staging or prod: the suffix of every name."
  type        = string

  validation {
    condition     = contains(["dev", "staging", "prod"], var.env)
    error_message = "env is dev, staging or prod: the service knows no other."
  }
}

variable "project_id" {
  description = "The Google Cloud project."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "project_id is a project's id, such as my-project: not its number, not its name."
  }
}

variable "region" {
  description = "Where everything lives. BigQuery reads and writes cost less, and go faster, beside the data."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "region is a region, such as us-central1: not a zone, not a multi-region."
  }
}

variable "github" {
  description = <<-EOT
    Who may deploy. `repository_id` is GitHub's number for the repository, since a name can be given
    up and taken by somebody else; `environment` is the GitHub environment of the deploying job.
  EOT
  type = object({
    repository_id = string
    ref           = optional(string, "refs/heads/main")
    environment   = optional(string, "gcp")
  })

  validation {
    condition     = can(regex("^[1-9][0-9]*$", var.github.repository_id))
    error_message = "repository_id is a number: gh api repos/OWNER/NAME --jq .id"
  }

  validation {
    condition     = can(regex("^refs/heads/[\\w./-]+$", var.github.ref))
    error_message = "ref is a branch in full, such as refs/heads/main."
  }

  validation {
    condition     = can(regex("^[\\w-]+$", var.github.environment))
    error_message = "environment is the name of a GitHub environment."
  }
}

variable "access" {
  description = <<-EOT
    Who may do what, and who is told:
    data_scientists: the group that publishes models, `group:…`.
    invokers: who may call the service and start the job.
    read_datasets, write_datasets: `project.dataset`, where runs may read and write beside the
    environment's own dataset.
    alert_emails: who is told of alerts.
  EOT
  type = object({
    data_scientists = optional(string)
    invokers        = optional(set(string), [])
    read_datasets   = optional(set(string), [])
    write_datasets  = optional(set(string), [])
    alert_emails    = optional(set(string), [])
  })
  default = {}

  validation {
    condition     = var.access.data_scientists == null || can(regex("^group:[^@\\s]+@[^@\\s]+$", var.access.data_scientists))
    error_message = "data_scientists is one group, such as group:data-science@example.com: people come and go in it."
  }

  validation {
    condition = alltrue([
      for member in var.access.invokers : can(regex("^(user|group|serviceAccount):[^@\\s]+@[^@\\s]+$", member))
    ])
    error_message = "invokers are users, groups and service accounts by their full name. Nobody anonymous, and no whole domain."
  }

  validation {
    condition = alltrue([
      for dataset in setunion(var.access.read_datasets, var.access.write_datasets) :
      can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]\\.\\w+$", dataset))
    ])
    error_message = "Datasets are written project.dataset."
  }
}

variable "protected" {
  description = "Whether Terraform refuses to destroy what holds data or takes calls."
  type        = bool
  default     = true
}

variable "promotes_from" {
  description = "The environment whose images this one runs. null: it runs its own builds."
  type        = string
  default     = null

  validation {
    condition     = var.promotes_from == null ? true : contains(["dev", "staging"], var.promotes_from) && var.promotes_from != var.env
    error_message = "promotes_from is another environment, dev or staging."
  }
}

variable "service" {
  description = <<-EOT
    Size of the service. `runs_per_instance` is how many requests an instance takes and how many runs
    it carries out: the next request starts another instance. A run needs `memory` for its chunks,
    whatever the size of the table.
  EOT
  type = object({
    cpu               = optional(string, "2")
    memory            = optional(string, "2Gi")
    runs_per_instance = optional(number, 2)
    min_instances     = optional(number, 0)
    max_instances     = optional(number, 4)
  })
  default = {}

  validation {
    condition     = contains(["1", "2", "4", "6", "8"], var.service.cpu)
    error_message = "cpu is 1, 2, 4, 6 or 8."
  }

  validation {
    condition     = can(regex("^([1-9]|[12][0-9]|3[0-2])Gi$", var.service.memory))
    error_message = "memory is 1Gi to 32Gi; the model cache and two runs do not fit into less."
  }

  validation {
    condition     = var.service.runs_per_instance >= 1 && var.service.runs_per_instance <= 8
    error_message = "runs_per_instance is 1 to 8: runs share the instance's CPU and memory."
  }

  validation {
    condition     = var.service.min_instances >= 0 && var.service.min_instances <= var.service.max_instances && var.service.max_instances <= 100
    error_message = "min_instances is at most max_instances, which is at most 100."
  }
}

variable "job" {
  description = "Size of the job, for tables that take longer than the hour that a request may take."
  type = object({
    cpu     = optional(string, "4")
    memory  = optional(string, "4Gi")
    timeout = optional(string, "86400s")
  })
  default = {}

  validation {
    condition     = can(regex("^[0-9]{2,6}s$", var.job.timeout))
    error_message = "timeout is in seconds, such as 86400s; Cloud Run allows 168 hours."
  }
}

variable "settings" {
  description = "Further settings of the service and the job, as .env.example documents them."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for name in keys(var.settings) : can(regex("^[A-Z][A-Z0-9_]*$", name)) && name != "PORT"])
    error_message = "settings are environment variables; PORT is Cloud Run's own."
  }
}

variable "initial_image" {
  description = "What runs until the first deployment; from then on the workflows own the image."
  type        = string
  default     = "us-docker.pkg.dev/cloudrun/container/hello"
}
