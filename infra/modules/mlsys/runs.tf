# The run journal: one small object a run, rewritten at each step with ifGenerationMatch.
resource "google_storage_bucket" "runs" {
  project                     = var.project_id
  name                        = "mlsys-runs-${var.env}"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false
  deletion_policy             = local.deletion_policy
  labels                      = local.labels

  # What a run's journal said before is there to read when a run has gone wrong.
  versioning {
    enabled = true
  }

  # A run id writes once for as long as its object is here.
  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      age        = 90
      with_state = "LIVE"
    }
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      days_since_noncurrent_time = 14
      with_state                 = "ARCHIVED"
    }
  }
}

# Replacing an object takes the right to delete it.
resource "google_storage_bucket_iam_member" "runs_runtime" {
  bucket = google_storage_bucket.runs.name
  role   = "roles/storage.objectUser"
  member = google_service_account.runtime.member
}
