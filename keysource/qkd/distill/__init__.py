"""From detections to key: sifting, estimation, Cascade, verification, amplification, authentication.  Sans-IO."""
