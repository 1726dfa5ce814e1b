output "service" {
  description = "The service's name."
  value       = google_cloud_run_v2_service.this.name
}

output "url" {
  description = "Where the service answers; also the audience of the tokens that it takes."
  value       = "https://${google_cloud_run_v2_service.this.name}-${data.google_project.this.number}.${var.region}.run.app"
}

output "job" {
  description = "The job's name."
  value       = google_cloud_run_v2_job.predict.name
}

output "image" {
  description = "Where images are pushed, without tag or digest."
  value       = "${var.region}-docker.pkg.dev/${var.project_id}/${google_artifact_registry_repository.images.repository_id}/mlsys"
}

output "buckets" {
  description = "Of models and of runs."
  value       = { models = google_storage_bucket.models.name, runs = google_storage_bucket.runs.name }
}

output "registry_table" {
  description = "Full path of the model registry."
  value       = "${var.project_id}.${google_bigquery_dataset.this.dataset_id}.${google_bigquery_table.registry.table_id}"
}

output "workload_identity_provider" {
  description = "What google-github-actions/auth is given."
  value       = google_iam_workload_identity_pool_provider.github.name
}

output "service_accounts" {
  description = "The account that runs, and those of the workflows."
  value = {
    runtime   = google_service_account.runtime.email
    deploy    = google_service_account.deploy.email
    terraform = google_service_account.terraform.email
    plan      = google_service_account.plan.email
  }
}

output "deploys_from" {
  description = "The branch and the GitHub environment that may deploy here, and whose images those are."
  value = {
    ref         = var.github.ref
    environment = var.github.environment
    images_of   = coalesce(var.promotes_from, var.env)
  }
}

output "protected" {
  description = "Whether Terraform refuses to destroy what holds data or takes calls."
  value       = var.protected
}
