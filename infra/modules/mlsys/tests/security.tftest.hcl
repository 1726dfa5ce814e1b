# What has to stay true of every environment, whoever changes the module. Nothing is created: the
# provider is a stand-in.

mock_provider "google" {
  mock_data "google_project" {
    defaults = { number = "123456789012" }
  }
}

variables {
  env        = "prod"
  project_id = "my-project"
  region     = "us-central1"
  github     = { repository_id = "987654321", environment = "prod" }
  access = {
    data_scientists = "group:data-science@example.com"
    invokers        = ["serviceAccount:scheduler@my-project.iam.gserviceaccount.com"]
    read_datasets   = ["my-project.warehouse"]
    write_datasets  = ["my-project.predictions"]
    alert_emails    = ["on-call@example.com"]
  }
  promotes_from = "staging"
}

override_resource {
  target = google_service_account.runtime
  values = { member = "serviceAccount:runtime", email = "runtime@example.com" }
}

override_resource {
  target = google_service_account.deploy
  values = { member = "serviceAccount:deploy", email = "deploy@example.com" }
}

override_resource {
  target = google_service_account.terraform
  values = { member = "serviceAccount:terraform", email = "terraform@example.com" }
}

override_resource {
  target = google_service_account.plan
  values = { member = "serviceAccount:plan", email = "plan@example.com" }
}

override_resource {
  target = google_iam_workload_identity_pool.github
  # pragma: allowlist nextline secret
  values = { name = "projects/123456789012/locations/global/workloadIdentityPools/mlsys-github-prod" }
}

run "nobody_gets_in_without_a_name" {
  assert {
    condition = alltrue([
      for member in concat(
        flatten([for binding in jsondecode(google_storage_bucket_iam_policy.models.policy_data).bindings : binding.members]),
        [google_storage_bucket_iam_member.runs_runtime.member],
        [google_storage_bucket_iam_member.runs_plan.member],
        [for each in google_storage_bucket_iam_member.state : each.member],
        [for each in google_cloud_run_v2_service_iam_member.invokers : each.member],
        [for each in google_cloud_run_v2_service_iam_member.deploy : each.member],
        [for each in google_cloud_run_v2_job_iam_member.invokers : each.member],
        [google_cloud_run_v2_job_iam_member.deploy.member],
        [google_bigquery_dataset_iam_member.runtime.member],
        [for each in google_bigquery_dataset_iam_member.read : each.member],
        [for each in google_bigquery_dataset_iam_member.write : each.member],
        [google_artifact_registry_repository_iam_member.deploy.member],
        [for each in google_artifact_registry_repository_iam_member.promotes_from : each.member],
        [google_service_account_iam_member.deploy_runtime.member],
        [google_service_account_iam_member.terraform_runtime.member],
        [for each in google_project_iam_member.runtime : each.member],
        [google_project_iam_member.deploy.member],
        [for each in google_project_iam_member.plan : each.member],
        [for each in google_project_iam_member.terraform : each.member],
      ) : !can(regex("^(allUsers|allAuthenticatedUsers|domain:|projectEditor:|projectViewer:)", member))
    ])
    error_message = "Everyone, a whole domain or every editor of the project is let in somewhere."
  }

  assert {
    condition     = google_cloud_run_v2_service.this.invoker_iam_disabled != true
    error_message = "The service takes calls without asking IAM."
  }
}

run "models_are_written_by_few_and_nothing_is_lost" {
  assert {
    condition = {
      for binding in jsondecode(google_storage_bucket_iam_policy.models.policy_data).bindings : binding.role => toset(binding.members)
      } == {
      "roles/storage.admin"              = toset(["projectOwner:my-project"])
      "roles/storage.objectUser"         = toset(["serviceAccount:deploy"])
      "roles/storage.objectCreator"      = toset(["group:data-science@example.com"])
      "roles/storage.legacyBucketReader" = toset(["serviceAccount:plan"])
      "roles/storage.objectViewer"       = toset(["serviceAccount:runtime", "group:data-science@example.com"])
    }
    error_message = "Somebody else can write a model, and a pickle runs code with the service's rights."
  }

  assert {
    condition = alltrue([
      for bucket in [google_storage_bucket.models, google_storage_bucket.runs] :
      bucket.versioning[0].enabled && bucket.uniform_bucket_level_access && bucket.public_access_prevention == "enforced" && !bucket.force_destroy
    ])
    error_message = "A bucket is not versioned, not uniform, may be public, or is destroyed with its objects."
  }

  assert {
    condition     = google_storage_bucket.models.soft_delete_policy[0].retention_duration_seconds >= 7 * 24 * 3600
    error_message = "A deleted model can't be brought back for a week."
  }

  assert {
    condition     = anytrue([for rule in google_storage_bucket.runs.lifecycle_rule : one(rule.condition).age == 90])
    error_message = "The run journal grows for ever."
  }
}

run "the_service_may_do_what_it_needs_and_no_more" {
  assert {
    condition     = toset([for each in google_project_iam_member.runtime : each.role]) == toset(["roles/bigquery.jobUser", "roles/bigquery.readSessionUser"])
    error_message = "The runtime account has another role on the project."
  }

  assert {
    condition = {
      for each in concat([google_bigquery_dataset_iam_member.runtime], values(google_bigquery_dataset_iam_member.read), values(google_bigquery_dataset_iam_member.write)) :
      each.dataset_id => each.role
      } == {
      mlsys_prod  = "roles/bigquery.dataEditor"
      warehouse   = "roles/bigquery.dataViewer"
      predictions = "roles/bigquery.dataEditor"
    }
    error_message = "Data is open otherwise than `access` says."
  }

  assert {
    condition = alltrue([
      for each in concat([google_project_iam_member.deploy], values(google_project_iam_member.runtime), values(google_project_iam_member.plan), values(google_project_iam_member.terraform)) :
      !contains(["roles/owner", "roles/editor", "roles/viewer", "roles/iam.serviceAccountTokenCreator", "roles/iam.serviceAccountUser"], each.role)
    ])
    error_message = "An account has a basic role, or may act as every other account of the project."
  }

  assert {
    condition = (
      google_cloud_run_v2_service.this.template[0].service_account == "runtime@example.com" &&
      google_cloud_run_v2_job.predict.template[0].template[0].service_account == "runtime@example.com"
    )
    error_message = "The service or the job runs as another account."
  }
}

run "only_this_repository_gets_in_and_only_its_branch_changes_anything" {
  assert {
    condition     = google_iam_workload_identity_pool_provider.github.attribute_condition == "assertion.repository_id == '987654321'"
    error_message = "Other repositories get a token."
  }

  assert {
    condition     = google_iam_workload_identity_pool_provider.github.attribute_mapping["attribute.use"] == "(assertion.event_name == 'pull_request') ? 'plan' : (assertion.ref == 'refs/heads/main' && assertion.environment == 'prod') ? 'change' : 'none'"
    error_message = "Another branch, or a job outside the protected environment, may deploy."
  }

  assert {
    condition = {
      deploy    = google_service_account_iam_member.deploy_github.member
      terraform = google_service_account_iam_member.terraform_github.member
      plan      = google_service_account_iam_member.plan_github.member
      } == {
      for account, use in { deploy = "change", terraform = "change", plan = "plan" } :
      account => "principalSet://iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/mlsys-github-prod/attribute.use/${use}"
    }
    error_message = "A pull request can act as an account that changes something."
  }

  assert {
    condition     = strcontains(one(google_project_iam_member.terraform_iam.condition).expression, "hasOnly([") && !can(regex("(owner|editor|[aA]dmin)", one(google_project_iam_member.terraform_iam.condition).expression))
    error_message = "Who applies Terraform can grant itself anything."
  }
}

run "what_holds_data_is_protected" {
  assert {
    condition = (
      google_cloud_run_v2_service.this.deletion_protection && google_cloud_run_v2_job.predict.deletion_protection &&
      google_bigquery_table.registry.deletion_protection && !google_bigquery_dataset.this.delete_contents_on_destroy
    )
    error_message = "Terraform may destroy the service, the job or the registry."
  }

  assert {
    condition = alltrue([
      for each in [google_storage_bucket.models, google_storage_bucket.runs, google_bigquery_dataset.this, google_artifact_registry_repository.images] :
      each.deletion_policy == "PREVENT"
    ])
    error_message = "Terraform may destroy a bucket, the dataset or the images."
  }
}

run "anonymous_invokers_are_refused" {
  command = plan
  variables {
    access = { invokers = ["allUsers"] }
  }
  expect_failures = [var.access]
}

run "a_whole_domain_is_refused" {
  command = plan
  variables {
    access = { invokers = ["domain:example.com"] }
  }
  expect_failures = [var.access]
}

run "one_person_is_no_group_of_data_scientists" {
  command = plan
  variables {
    access = { data_scientists = "user:one@example.com" }
  }
  expect_failures = [var.access]
}

run "a_repository_is_known_by_its_number" {
  command = plan
  variables {
    github = { repository_id = "owner/name" }
  }
  expect_failures = [var.github]
}
