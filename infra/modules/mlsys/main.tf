data "google_project" "this" {
  project_id = var.project_id
}

locals {
  name    = "mlsys-${var.env}"
  dataset = "mlsys_${var.env}"

  # Where both are set, the provider's own refusal comes before Google's, with a better message.
  deletion_policy = var.protected ? "PREVENT" : "DELETE"

  labels = {
    app        = "mlsys"
    env        = var.env
    managed-by = "terraform"
  }

  # The service and the job are the same code with the same settings.
  environment = merge(
    {
      MLSYS_ENV                             = var.env
      GCP_PROJECT_ID                        = var.project_id
      GCP_REGION                            = var.region
      "GCS_BUCKET_MODELS_${upper(var.env)}" = google_storage_bucket.models.name
      "GCS_BUCKET_RUNS_${upper(var.env)}"   = google_storage_bucket.runs.name
      MAX_RUNS                              = tostring(var.service.runs_per_instance)
    },
    var.settings,
  )
}
