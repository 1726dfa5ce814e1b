# How GitHub's workflows get in: Workload Identity Federation, and no key that could leak. Of the
# three accounts, `plan` may look, from any pull request of the repository itself; `deploy` moves
# images and traffic, and `terraform` changes what this module makes, both from one branch and one
# GitHub environment alone.

resource "google_iam_workload_identity_pool" "github" {
  project                   = var.project_id
  workload_identity_pool_id = "mlsys-github-${var.env}"
  display_name              = "mlsys ${var.env}: GitHub"
  deletion_policy           = local.deletion_policy
}

resource "google_iam_workload_identity_pool_provider" "github" {
  project                            = var.project_id
  workload_identity_pool_id          = google_iam_workload_identity_pool.github.workload_identity_pool_id
  workload_identity_pool_provider_id = "github"
  display_name                       = "GitHub Actions"
  deletion_policy                    = local.deletion_policy

  oidc {
    issuer_uri = "https://token.actions.githubusercontent.com"
  }

  attribute_mapping = {
    "google.subject" = "assertion.sub"
    # What the accounts below are bound to, so that each claim is compared in one place: here.
    "attribute.use" = join(" ", [
      "(assertion.event_name == 'pull_request') ? 'plan' :",
      "(assertion.ref == '${var.github.ref}' && assertion.environment == '${var.github.environment}') ? 'change' : 'none'",
    ])
  }

  # By number: a name can be given up, and taken by somebody else. Forks have numbers of their own.
  attribute_condition = "assertion.repository_id == '${var.github.repository_id}'"
}

locals {
  github = "principalSet://iam.googleapis.com/${google_iam_workload_identity_pool.github.name}/attribute.use"
}

resource "google_service_account" "deploy" {
  project      = var.project_id
  account_id   = "mlsys-deploy-${var.env}"
  display_name = "mlsys ${var.env}: workflows that deploy"
}

resource "google_service_account_iam_member" "deploy_github" {
  service_account_id = google_service_account.deploy.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "${local.github}/change"
}

# To see which revision serves, here and in the environment that images come from.
resource "google_project_iam_member" "deploy" {
  project = var.project_id
  role    = "roles/run.viewer"
  member  = google_service_account.deploy.member
}

# To put a revision in place that runs as the runtime account.
resource "google_service_account_iam_member" "deploy_runtime" {
  service_account_id = google_service_account.runtime.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.deploy.member
}

resource "google_service_account" "terraform" {
  project      = var.project_id
  account_id   = "mlsys-terraform-${var.env}"
  display_name = "mlsys ${var.env}: workflows that apply Terraform"
}

resource "google_service_account_iam_member" "terraform_github" {
  service_account_id = google_service_account.terraform.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "${local.github}/change"
}

resource "google_service_account_iam_member" "terraform_runtime" {
  service_account_id = google_service_account.runtime.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.terraform.member
}

resource "google_project_iam_member" "terraform" {
  for_each = toset([
    "roles/artifactregistry.admin",
    "roles/bigquery.admin",
    "roles/iam.serviceAccountAdmin",
    "roles/iam.workloadIdentityPoolAdmin",
    "roles/logging.configWriter",
    "roles/monitoring.editor",
    "roles/run.admin",
    "roles/storage.admin",
  ])

  project = var.project_id
  role    = each.value
  member  = google_service_account.terraform.member
}

# It may hand out on the project what runs and who plans are given, and so can't make itself an owner.
# A change of its own roles, above, is for an owner to apply.
resource "google_project_iam_member" "terraform_iam" {
  project = var.project_id
  role    = "roles/resourcemanager.projectIamAdmin"
  member  = google_service_account.terraform.member

  condition {
    title      = "only-what-mlsys-needs"
    expression = "api.getAttribute('iam.googleapis.com/modifiedGrantsByRole', []).hasOnly(${local.grantable})"
  }
}

locals {
  plan_roles = toset([
    "roles/artifactregistry.reader",
    "roles/bigquery.metadataViewer",
    "roles/iam.securityReviewer",
    "roles/iam.serviceAccountViewer",
    "roles/iam.workloadIdentityPoolViewer",
    "roles/logging.viewer",
    "roles/monitoring.viewer",
    "roles/run.viewer",
  ])

  grantable = "['${join("', '", sort(setunion(local.plan_roles, ["roles/bigquery.jobUser", "roles/bigquery.readSessionUser"])))}']"
}

resource "google_service_account" "plan" {
  project      = var.project_id
  account_id   = "mlsys-plan-${var.env}"
  display_name = "mlsys ${var.env}: pull requests that plan"
}

resource "google_service_account_iam_member" "plan_github" {
  service_account_id = google_service_account.plan.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "${local.github}/plan"
}

# Metadata, policies and logs: no rows and no models.
resource "google_project_iam_member" "plan" {
  for_each = local.plan_roles

  project = var.project_id
  role    = each.value
  member  = google_service_account.plan.member
}

resource "google_storage_bucket_iam_member" "state" {
  for_each = {
    terraform = { role = "roles/storage.objectUser", member = google_service_account.terraform.member }
    plan      = { role = "roles/storage.objectViewer", member = google_service_account.plan.member }
  }

  bucket = "mlsys-terraform-state-${var.env}"
  role   = each.value.role
  member = each.value.member
}

# The bucket's own settings, and the names of what is in it.
resource "google_storage_bucket_iam_member" "runs_plan" {
  bucket = google_storage_bucket.runs.name
  role   = "roles/storage.legacyBucketReader"
  member = google_service_account.plan.member
}
