terraform {
  backend "gcs" {
    bucket = "mlsys-terraform-state-prod"
  }
}

provider "google" {
  project = var.project_id
  region  = var.region
}

module "mlsys" {
  source = "../../modules/mlsys"

  env        = "prod"
  project_id = var.project_id
  region     = var.region
  github     = { repository_id = var.github_repository_id, environment = "prod" }
  access     = var.access

  promotes_from = "staging"
  service       = { min_instances = 1, max_instances = 10 }
}

output "mlsys" {
  value = module.mlsys
}
