locals {
  service_filter = "resource.type=\"cloud_run_revision\" AND resource.labels.service_name=\"${google_cloud_run_v2_service.this.name}\""
  job_filter     = "resource.type=\"cloud_run_job\" AND resource.labels.job_name=\"${google_cloud_run_v2_job.predict.name}\""

  charts = [
    { title = "Requests a second, by status", metric = "run.googleapis.com/request_count", where = local.service_filter, aligner = "ALIGN_RATE", reducer = "REDUCE_SUM", by = ["metric.label.response_code_class"] },
    { title = "Duration of requests, 95th percentile", metric = "run.googleapis.com/request_latencies", where = local.service_filter, aligner = "ALIGN_PERCENTILE_95", reducer = "REDUCE_MAX", by = [] },
    { title = "Failed runs, by error", metric = "logging.googleapis.com/user/${google_logging_metric.failed_runs.name}", where = "resource.type=\"cloud_run_revision\"", aligner = "ALIGN_DELTA", reducer = "REDUCE_SUM", by = ["metric.label.error"] },
    { title = "Executions of the job, by result", metric = "run.googleapis.com/job/completed_execution_count", where = local.job_filter, aligner = "ALIGN_DELTA", reducer = "REDUCE_SUM", by = ["metric.label.result"] },
    { title = "Memory of the fullest instance, share of its limit", metric = "run.googleapis.com/container/memory/utilizations", where = local.service_filter, aligner = "ALIGN_PERCENTILE_99", reducer = "REDUCE_MAX", by = [] },
    { title = "CPU of the busiest instance, share of its limit", metric = "run.googleapis.com/container/cpu/utilizations", where = local.service_filter, aligner = "ALIGN_PERCENTILE_99", reducer = "REDUCE_MAX", by = [] },
    { title = "Instances, by state", metric = "run.googleapis.com/container/instance_count", where = local.service_filter, aligner = "ALIGN_MAX", reducer = "REDUCE_SUM", by = ["metric.label.state"] },
    { title = "Start-up of instances, 95th percentile", metric = "run.googleapis.com/container/startup_latencies", where = local.service_filter, aligner = "ALIGN_PERCENTILE_95", reducer = "REDUCE_MAX", by = [] },
  ]
}

resource "google_monitoring_dashboard" "this" {
  project = var.project_id

  dashboard_json = jsonencode({
    displayName = local.name
    mosaicLayout = {
      columns = 48
      tiles = [
        for index, chart in local.charts : {
          xPos   = index % 2 * 24
          yPos   = floor(index / 2) * 16
          width  = 24
          height = 16
          widget = {
            title = chart.title
            xyChart = {
              dataSets = [{
                plotType = "LINE"
                timeSeriesQuery = {
                  timeSeriesFilter = {
                    filter = "metric.type=\"${chart.metric}\" AND ${chart.where}"
                    aggregation = {
                      alignmentPeriod    = "60s"
                      perSeriesAligner   = chart.aligner
                      crossSeriesReducer = chart.reducer
                      groupByFields      = chart.by
                    }
                  }
                }
              }]
            }
          }
        }
      ]
    }
  })
}
