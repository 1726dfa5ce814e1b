resource "google_monitoring_notification_channel" "email" {
  for_each = var.access.alert_emails

  project      = var.project_id
  display_name = "mlsys ${var.env}: ${each.value}"
  type         = "email"
  labels       = { email_address = each.value }
}

# Runs that failed in the service, by the error's name as it is in service/problems.py. An exception
# that nobody foresaw has none.
resource "google_logging_metric" "failed_runs" {
  project     = var.project_id
  name        = "${local.name}-failed-runs"
  description = "Runs of the service that failed, by error"
  filter = join(" AND ", [
    "resource.type=\"cloud_run_revision\"",
    "resource.labels.service_name=\"${google_cloud_run_v2_service.this.name}\"",
    "jsonPayload.message=~\"^run failed\"",
  ])

  metric_descriptor {
    metric_kind = "DELTA"
    value_type  = "INT64"

    labels {
      key         = "error"
      description = "The exception's name"
    }
  }

  label_extractors = {
    error = "EXTRACT(jsonPayload.error)"
  }
}

locals {
  guide = "infra/README.md in the repository says what to do."

  # The caller is told what to mend, with a status from 400 to 499; nobody here has to get up.
  callers_errors = "InvalidRequest|AccessDenied|NotFound|Conflict|UnderWay|TakenOver|RunMismatch|TableMismatch|TooManyRuns"

  alerts = {
    failed-runs = {
      severity  = "ERROR"
      what      = "runs fail, and not by their callers' mistake"
      filter    = "metric.type=\"logging.googleapis.com/user/${google_logging_metric.failed_runs.name}\" AND resource.type=\"cloud_run_revision\" AND metric.labels.error!=monitoring.regex.full_match(\"${local.callers_errors}\")"
      aligner   = "ALIGN_DELTA"
      reducer   = "REDUCE_SUM"
      period    = "300s"
      duration  = "0s"
      threshold = 0
    }
    failed-jobs = {
      severity  = "ERROR"
      what      = "an execution of the job has failed, with all its retries"
      filter    = "metric.type=\"run.googleapis.com/job/completed_execution_count\" AND resource.type=\"cloud_run_job\" AND resource.labels.job_name=\"${google_cloud_run_v2_job.predict.name}\" AND metric.labels.result=\"failed\""
      aligner   = "ALIGN_DELTA"
      reducer   = "REDUCE_SUM"
      period    = "300s"
      duration  = "0s"
      threshold = 0
    }
    memory = {
      severity  = "WARNING"
      what      = "an instance of the service has held over 85 % of its memory for five minutes"
      filter    = "metric.type=\"run.googleapis.com/container/memory/utilizations\" AND resource.type=\"cloud_run_revision\" AND resource.labels.service_name=\"${google_cloud_run_v2_service.this.name}\""
      aligner   = "ALIGN_PERCENTILE_99"
      reducer   = "REDUCE_MAX"
      period    = "60s"
      duration  = "300s"
      threshold = 0.85
    }
  }
}

resource "google_monitoring_alert_policy" "this" {
  for_each = local.alerts

  project               = var.project_id
  display_name          = "${local.name}: ${each.key}"
  combiner              = "OR"
  severity              = each.value.severity
  notification_channels = [for channel in google_monitoring_notification_channel.email : channel.id]
  user_labels           = local.labels

  conditions {
    display_name = each.value.what

    condition_threshold {
      filter          = each.value.filter
      comparison      = "COMPARISON_GT"
      threshold_value = each.value.threshold
      duration        = each.value.duration

      aggregations {
        alignment_period     = each.value.period
        per_series_aligner   = each.value.aligner
        cross_series_reducer = each.value.reducer
      }
    }
  }

  alert_strategy {
    auto_close = "86400s"
  }

  documentation {
    mime_type = "text/markdown"
    subject   = "${local.name}: ${each.value.what}"
    content   = "In ${local.name}, ${each.value.what}. ${local.guide}"
  }
}
