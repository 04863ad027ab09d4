"""Several key sources behind one name: ``failover`` (the first that has keys), ``combine`` (all must be broken)."""
