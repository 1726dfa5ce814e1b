resource "google_cloud_run_v2_service" "this" {
  project             = var.project_id
  location            = var.region
  name                = local.name
  description         = "mlsys ${var.env}: batch predictions"
  ingress             = "INGRESS_TRAFFIC_ALL" # IAM decides who may call, from wherever that is.
  deletion_protection = var.protected
  labels              = local.labels

  template {
    service_account       = google_service_account.runtime.email
    execution_environment = "EXECUTION_ENVIRONMENT_GEN2"
    timeout               = "3600s" # The longest that Cloud Run allows; longer runs are the job's.

    # As many requests as an instance may have runs, so that one more starts another instance
    # instead of being answered 429.
    max_instance_request_concurrency = var.service.runs_per_instance

    scaling {
      min_instance_count = var.service.min_instances
      max_instance_count = var.service.max_instances
    }

    containers {
      image = var.initial_image

      ports {
        container_port = 8080
      }

      resources {
        limits = {
          cpu    = var.service.cpu
          memory = var.service.memory
        }
        # Billed by the instance: a run whose caller has gone still has to end, and to commit, and
        # to write its journal.
        cpu_idle          = false
        startup_cpu_boost = true
      }

      dynamic "env" {
        for_each = local.environment
        content {
          name  = env.key
          value = env.value
        }
      }

      # Up to 60 seconds, with the imports on a cold and busy machine in mind.
      startup_probe {
        period_seconds    = 2
        timeout_seconds   = 2
        failure_threshold = 30
        http_get {
          path = "/health"
        }
      }

      # Slow to judge: a model in pure Python may hold the interpreter for a while, and a restart
      # ends every run of the instance.
      liveness_probe {
        period_seconds    = 30
        timeout_seconds   = 10
        failure_threshold = 4
        http_get {
          path = "/health"
        }
      }
    }
  }

  lifecycle {
    # The workflows own the image, and which revision takes the calls.
    ignore_changes = [
      client,
      client_version,
      template[0].containers[0].image,
      template[0].labels,
      template[0].revision,
      traffic,
    ]
  }
}

resource "google_cloud_run_v2_service_iam_member" "invokers" {
  for_each = var.access.invokers

  project  = var.project_id
  location = var.region
  name     = google_cloud_run_v2_service.this.name
  role     = "roles/run.invoker"
  member   = each.value
}

resource "google_cloud_run_v2_service_iam_member" "deploy" {
  for_each = toset([
    "roles/run.developer",
    "roles/run.invoker", # the smoke test
  ])

  project  = var.project_id
  location = var.region
  name     = google_cloud_run_v2_service.this.name
  role     = each.value
  member   = google_service_account.deploy.member
}
