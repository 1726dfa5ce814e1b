# What the service, the workflows and the guide rely on.

mock_provider "google" {
  mock_data "google_project" {
    defaults = { number = "123456789012" }
  }
}

variables {
  env        = "dev"
  project_id = "my-project"
  region     = "us-central1"
  github     = { repository_id = "987654321" }
  protected  = false
}

run "names_are_those_of_the_specification" {
  assert {
    condition = [
      output.service, output.job, output.image, output.buckets.models, output.buckets.runs, output.registry_table, output.url,
      google_service_account.runtime.account_id,
      ] == [
      "mlsys-dev", "mlsys-predict-dev", "us-central1-docker.pkg.dev/my-project/mlsys-dev/mlsys", "mlsys-models-dev", "mlsys-runs-dev",
      "my-project.mlsys_dev.model_registry", "https://mlsys-dev-123456789012.us-central1.run.app",
      "mlsys-sa-dev",
    ]
    error_message = "A name has changed: ${jsonencode([output.service, output.job, output.image, output.buckets, output.registry_table, output.url])}"
  }
}

run "a_request_may_take_an_hour_and_keeps_its_cpu" {
  assert {
    condition = (
      google_cloud_run_v2_service.this.template[0].timeout == "3600s" &&
      google_cloud_run_v2_service.this.template[0].execution_environment == "EXECUTION_ENVIRONMENT_GEN2" &&
      google_cloud_run_v2_service.this.template[0].containers[0].resources[0].cpu_idle == false &&
      google_cloud_run_v2_service.this.template[0].containers[0].resources[0].startup_cpu_boost == true
    )
    error_message = "Long runs would be cut off, or starved of CPU."
  }

  assert {
    condition     = google_cloud_run_v2_service.this.template[0].max_instance_request_concurrency == 2 && one([for each in google_cloud_run_v2_service.this.template[0].containers[0].env : each.value if each.name == "MAX_RUNS"]) == "2"
    error_message = "An instance takes another number of requests than of runs."
  }

  assert {
    condition = (
      google_cloud_run_v2_service.this.template[0].containers[0].startup_probe[0].http_get[0].path == "/health" &&
      google_cloud_run_v2_service.this.template[0].containers[0].liveness_probe[0].http_get[0].path == "/health"
    )
    error_message = "A probe asks something else than /health."
  }
}

run "the_service_and_the_job_share_their_settings" {
  assert {
    condition     = google_cloud_run_v2_service.this.template[0].containers[0].env == google_cloud_run_v2_job.predict.template[0].template[0].containers[0].env
    error_message = "The service and the job have different settings."
  }

  assert {
    condition     = one([for each in google_cloud_run_v2_service.this.template[0].containers[0].env : each.value if each.name == "MLSYS_ENV"]) == "dev"
    error_message = "The deployment would answer for other environments."
  }
}

run "the_registry_has_the_columns_of_the_code" {
  assert {
    condition     = slice([for column in jsondecode(google_bigquery_table.registry.schema) : column.name], 0, 9) == ["model_name", "model_version", "environment", "gcs_bucket", "file_size_bytes", "upload_timestamp", "uploader", "registered_at", "metadata"]
    error_message = "The registry's first columns are others."
  }
}

run "an_environment_without_people_can_be_made" {
  assert {
    condition     = length(google_cloud_run_v2_service_iam_member.invokers) == 0 && length(google_monitoring_notification_channel.email) == 0 && length(google_monitoring_alert_policy.this) == 3
    error_message = "Defaults let somebody in, or leave an alert out."
  }
}

run "settings_reach_the_service" {
  variables {
    settings = { CHUNK_ROWS = "4096" }
  }

  assert {
    condition     = one([for each in google_cloud_run_v2_service.this.template[0].containers[0].env : each.value if each.name == "CHUNK_ROWS"]) == "4096"
    error_message = "A setting got lost."
  }
}
