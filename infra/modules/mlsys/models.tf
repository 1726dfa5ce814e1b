resource "google_storage_bucket" "models" {
  project                     = var.project_id
  name                        = "mlsys-models-${var.env}"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false
  deletion_policy             = local.deletion_policy
  labels                      = local.labels

  versioning {
    enabled = true
  }

  soft_delete_policy {
    retention_duration_seconds = 30 * 24 * 3600
  }

  # A generation that was overwritten is kept for as long as anybody might ask what it predicted.
  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      days_since_noncurrent_time = 365
      num_newer_versions         = 3
      with_state                 = "ARCHIVED"
    }
  }

  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }
    condition {
      age = 1
    }
  }
}

locals {
  # Loading a pickle runs its code, with the service's rights: whoever can write here can do what
  # the service can. Data scientists create and never overwrite, as publish_model does.
  model_access = {
    "roles/storage.admin"         = ["projectOwner:${var.project_id}"]
    "roles/storage.objectUser"    = [google_service_account.deploy.member]
    "roles/storage.objectCreator" = compact([var.access.data_scientists])
    # The bucket's own settings, and the names of what is in it.
    "roles/storage.legacyBucketReader" = [google_service_account.plan.member]
    "roles/storage.objectViewer" = concat(
      [google_service_account.runtime.member], compact([var.access.data_scientists])
    )
  }
}

# The whole policy, not members of it: a new bucket also lets every editor of the project write.
resource "google_storage_bucket_iam_policy" "models" {
  bucket = google_storage_bucket.models.name
  policy_data = jsonencode({
    bindings = [for role, members in local.model_access : { role = role, members = members } if length(members) > 0]
  })
}
