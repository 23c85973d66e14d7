"""From files to examples, sites, tokenised rows and batches."""
