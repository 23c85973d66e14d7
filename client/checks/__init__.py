"""What fedtune-client check looks at before a site takes part."""
