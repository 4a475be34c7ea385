"""Background jobs: the lease that lets one node do a job, and the maintenance that runs under it."""

from .job_lease import AcquiredLease, JobLease, JobLeaseLost, JobLeases

__all__ = ["AcquiredLease", "JobLease", "JobLeaseLost", "JobLeases"]
