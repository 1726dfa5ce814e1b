# `mlsys predict` in a process of its own: the same image, settings and journal as the service, and
# no caller who has to wait. Its arguments come with each execution.
resource "google_cloud_run_v2_job" "predict" {
  project             = var.project_id
  location            = var.region
  name                = "mlsys-predict-${var.env}"
  deletion_protection = var.protected
  labels              = local.labels

  template {
    task_count = 1

    template {
      service_account       = google_service_account.runtime.email
      execution_environment = "EXECUTION_ENVIRONMENT_GEN2"
      timeout               = var.job.timeout
      # A retry has the execution's name, which is the run's id: it writes nothing twice.
      max_retries = 2

      containers {
        image   = var.initial_image
        command = ["mlsys"]
        args    = ["predict", "--help"]

        resources {
          limits = {
            cpu    = var.job.cpu
            memory = var.job.memory
          }
        }

        dynamic "env" {
          for_each = local.environment
          content {
            name  = env.key
            value = env.value
          }
        }
      }
    }
  }

  lifecycle {
    ignore_changes = [client, client_version, template[0].template[0].containers[0].image]
  }
}

resource "google_cloud_run_v2_job_iam_member" "invokers" {
  for_each = {
    for pair in setproduct(var.access.invokers, [
      "roles/run.jobsExecutorWithOverrides", # the arguments are overrides
      "roles/run.viewer",                    # `gcloud run jobs execute --wait`
    ]) : join(" ", pair) => { member = pair[0], role = pair[1] }
  }

  project  = var.project_id
  location = var.region
  name     = google_cloud_run_v2_job.predict.name
  role     = each.value.role
  member   = each.value.member
}

resource "google_cloud_run_v2_job_iam_member" "deploy" {
  project  = var.project_id
  location = var.region
  name     = google_cloud_run_v2_job.predict.name
  role     = "roles/run.developer"
  member   = google_service_account.deploy.member
}
