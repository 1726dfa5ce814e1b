mock_provider "google" {}

variables {
  project_id           = "my-project"
  region               = "us-central1"
  github_repository_id = "987654321"
  access = {
    data_scientists = "group:data-science@example.com"
    invokers        = ["group:callers@example.com", "serviceAccount:scheduler@my-project.iam.gserviceaccount.com"]
    read_datasets   = ["my-project.warehouse"]
  }
}

run "prod_is_prod" {
  assert {
    condition     = output.mlsys.service == "mlsys-prod" && output.mlsys.protected
    error_message = "This is another environment, or not protected as it should be."
  }

  assert {
    condition     = output.mlsys.deploys_from == { ref = "refs/heads/main", environment = "prod", images_of = "staging" }
    error_message = "Somebody else may deploy here, or other images."
  }
}
