"""What slicecast knows about models, as data: family rules and snapshots of MaxText's trees."""
