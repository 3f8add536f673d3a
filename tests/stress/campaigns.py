"""What the commands of this folder count, and how they tell of it."""

from collections import Counter


class Tally:
    """How often each property was tested, and held."""
    def __init__(self):
        self.tested = Counter()
        self.held = Counter()

    def check(self, name: str, holds: bool):
        self.tested[name] += 1
        self.held[name] += holds

    def __str__(self):
        parts = [f"{name} {self.held[name]} of {count}" for name, count in self.tested.items()]
        return ", ".join(parts) or "nothing tested"


def run_campaigns(campaigns: dict) -> bool:
    """Call each campaign, which returns a Tally, and print it by its name. Returns whether all
    properties held."""
    all_held = True
    for what, campaign in campaigns.items():
        tally = campaign()
        all_held = all_held and tally.held == tally.tested
        print(f"{what}: {tally}", flush=True)
    return all_held
