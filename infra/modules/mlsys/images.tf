resource "google_artifact_registry_repository" "images" {
  project         = var.project_id
  location        = var.region
  repository_id   = local.name
  format          = "DOCKER"
  description     = "mlsys ${var.env}: images that were built or promoted to run here"
  deletion_policy = local.deletion_policy
  labels          = local.labels

  vulnerability_scanning_config {
    enablement_config = "INHERITED"
  }

  # A keep rule wins over a delete rule. An image is three versions (its index, the image itself and
  # its SBOM and provenance), so this keeps the last twenty, among them the one that runs.
  cleanup_policies {
    id     = "keep-recent"
    action = "KEEP"
    most_recent_versions {
      keep_count = 60
    }
  }

  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"
    condition {
      tag_state  = "ANY"
      older_than = "7776000s" # 90 days
    }
  }
}

resource "google_artifact_registry_repository_iam_member" "deploy" {
  project    = var.project_id
  location   = var.region
  repository = google_artifact_registry_repository.images.repository_id
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.deploy.member
}

# To copy the image that the environment before this one runs. That one has to be there first.
resource "google_artifact_registry_repository_iam_member" "promotes_from" {
  count = var.promotes_from == null ? 0 : 1

  project    = var.project_id
  location   = var.region
  repository = "mlsys-${var.promotes_from}"
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.deploy.member
}
