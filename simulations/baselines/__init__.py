"""What a federation is measured against: each site alone, all rows in one place, the head alone, no training."""
