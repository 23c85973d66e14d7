"""``policy show``: the site's own rules, as they hold."""

from __future__ import annotations

from client.commands.options import DEFAULT_SITE, AsJson, Debug, SiteConfigPath, show
from common.console import new_app, one_line_errors

app = new_app("fedtune-client policy", "The site's policy, which a run can only be stricter than.")


@app.command("show")
def show_policy(site: SiteConfigPath = DEFAULT_SITE, as_json: AsJson = False, debug: Debug = False) -> None:
    """Print every rule, its value and what it means, those that are not set included."""
    with one_line_errors(debug):
        from client.site_config import load_site_config
        from client.site_tables import policy_table

        own = load_site_config(site)
        values = {"policy": own.policy.model_dump(mode="json"), "budget": own.budget.model_dump(mode="json")}
        show(values, [policy_table(own)], as_json)
