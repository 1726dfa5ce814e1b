terraform {
  backend "gcs" {
    bucket = "mlsys-terraform-state-staging"
  }
}

provider "google" {
  project = var.project_id
  region  = var.region
}

module "mlsys" {
  source = "../../modules/mlsys"

  env        = "staging"
  project_id = var.project_id
  region     = var.region
  github     = { repository_id = var.github_repository_id }
  access     = var.access

  promotes_from = "dev"
}

output "mlsys" {
  value = module.mlsys
}
