mock_provider "google" {}

variables {
  project_id           = "my-project"
  region               = "us-central1"
  github_repository_id = "987654321"
}

run "staging_is_staging" {
  assert {
    condition     = output.mlsys.service == "mlsys-staging" && output.mlsys.protected
    error_message = "This is another environment, or not protected as it should be."
  }

  assert {
    condition     = output.mlsys.deploys_from == { ref = "refs/heads/main", environment = "gcp", images_of = "dev" }
    error_message = "Somebody else may deploy here, or other images."
  }
}
