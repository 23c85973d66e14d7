"""A site's privacy ledger: what left it, what that spent, and the refusal to spend more."""
