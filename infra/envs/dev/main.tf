terraform {
  backend "gcs" {
    bucket = "mlsys-terraform-state-dev"
  }
}

provider "google" {
  project = var.project_id
  region  = var.region
}

module "mlsys" {
  source = "../../modules/mlsys"

  env        = "dev"
  project_id = var.project_id
  region     = var.region
  github     = { repository_id = var.github_repository_id }
  access     = var.access

  protected = false
}

output "mlsys" {
  value = module.mlsys
}
