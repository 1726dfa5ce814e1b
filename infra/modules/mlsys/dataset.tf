resource "google_bigquery_dataset" "this" {
  project                    = var.project_id
  dataset_id                 = local.dataset
  location                   = var.region
  description                = "mlsys ${var.env}: the model registry, and tables of predictions"
  delete_contents_on_destroy = false
  deletion_policy            = local.deletion_policy
  labels                     = local.labels
}

resource "google_bigquery_dataset_iam_member" "runtime" {
  project    = var.project_id
  dataset_id = google_bigquery_dataset.this.dataset_id
  role       = "roles/bigquery.dataEditor"
  member     = google_service_account.runtime.member
}

# Where the tables to predict are, and where predictions go beside the dataset above.
resource "google_bigquery_dataset_iam_member" "read" {
  for_each = var.access.read_datasets

  project    = split(".", each.value)[0]
  dataset_id = split(".", each.value)[1]
  role       = "roles/bigquery.dataViewer"
  member     = google_service_account.runtime.member
}

resource "google_bigquery_dataset_iam_member" "write" {
  for_each = var.access.write_datasets

  project    = split(".", each.value)[0]
  dataset_id = split(".", each.value)[1]
  role       = "roles/bigquery.dataEditor"
  member     = google_service_account.runtime.member
}

# Thousands of rows at most, so partitions would only cost; a scan asks for one environment, and
# its MERGE joins on these three columns.
resource "google_bigquery_table" "registry" {
  project             = var.project_id
  dataset_id          = google_bigquery_dataset.this.dataset_id
  table_id            = "model_registry"
  description         = "Every model in the bucket, as the last scan found it"
  schema              = file("${path.module}/registry_schema.json")
  clustering          = ["environment", "model_name", "model_version"]
  deletion_protection = var.protected
  labels              = local.labels
}
