"""The resident agent of a site: what holds model, data, policy and ledger, and the socket that leads to it."""
