# The account that the service and the job run as. What it may do to a resource stands beside the
# resource; here is only what can be granted on a project alone.

resource "google_service_account" "runtime" {
  project      = var.project_id
  account_id   = "mlsys-sa-${var.env}"
  display_name = "mlsys ${var.env}: the service and the job"
}

resource "google_project_iam_member" "runtime" {
  for_each = toset([
    "roles/bigquery.readSessionUser", # Storage Read API
    "roles/bigquery.jobUser",         # the registry's MERGE
  ])

  project = var.project_id
  role    = each.value
  member  = google_service_account.runtime.member
}
