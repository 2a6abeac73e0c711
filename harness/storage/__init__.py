"""The store of results, on a file system or an object store: records, locks, leases, clean-up."""
