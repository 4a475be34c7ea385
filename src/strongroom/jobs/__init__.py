"""Background jobs: the lease that lets one node do a job, and the maintenance that runs under it."""

from .job_lease import Lease, LeaseLost, Leases, Turn

__all__ = ["Lease", "LeaseLost", "Leases", "Turn"]
