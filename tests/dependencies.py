#!/usr/bin/env python3
"""Holds all dependencies to what deny.toml says of licences, bans and sources.

In: deny.toml, and the graph that `cargo metadata` resolves for its targets. Out: one line for each breach, and exit
status 1 if there was any. Never here: advisories, whose database has to be fetched; `make deny` asks for those, with
cargo-deny, which reads the same file.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"

# Every key of deny.toml that has a meaning here, or none without an advisory database or licence texts. Another one would
# be a rule that is believed to hold and does not.
KNOWN = {
    "graph": {"targets", "all-features"},
    "licenses": {"allow", "exceptions", "private", "confidence-threshold"},
    "bans": {"multiple-versions", "wildcards", "allow-wildcard-paths", "deny", "features"},
    "advisories": {"yanked", "unmaintained"},
    "sources": {"unknown-registry", "unknown-git"},
}
KNOWN_OF_A_BAN = {"crate", "deny-multiple-versions"}


def satisfied(expression, allowed):
    """Whether an SPDX expression can be met with allowed licences alone.

    >>> satisfied("MIT OR GPL-3.0", {"MIT"}), satisfied("MIT AND GPL-3.0", {"MIT"})
    (True, False)
    >>> satisfied("(MIT OR GPL-3.0) AND ISC", {"MIT", "ISC"}), satisfied("GPL-3.0/MIT", {"MIT"})
    (True, True)
    >>> satisfied("ISC OR MIT AND GPL-3.0", {"MIT"}), satisfied("ISC OR MIT AND GPL-3.0", {"ISC"})
    (False, True)
    >>> satisfied("Apache-2.0 WITH LLVM-exception", {"Apache-2.0"})
    False
    """
    words = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def term():
        word = words.pop(0)
        if word == "(":
            met = either()
            words.pop(0)
            return met
        if words[:1] == ["WITH"]:
            word = f"{word} WITH {words[1]}"
            del words[:2]
        return word in allowed

    def all_of():
        met = term()
        while words[:1] == ["AND"]:
            words.pop(0)
            met = term() and met
        return met

    def either():
        met = all_of()
        while words[:1] == ["OR"]:
            words.pop(0)
            met = all_of() or met
        return met

    return either()


def graph(targets):
    """Packages by id, and the features each is built with, on any of the targets."""
    packages, features = {}, {}
    for target in targets:
        command = ["cargo", "metadata", "--locked", "--format-version=1", f"--filter-platform={target}"]
        metadata = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
        used = {node["id"]: node["features"] for node in metadata["resolve"]["nodes"]}
        packages.update((package["id"], package) for package in metadata["packages"] if package["id"] in used)
        for package, enabled in used.items():
            features.setdefault(package, set()).update(enabled)
    return packages, features


def licence_breaches(rules, packages):
    exceptions = {exception["crate"]: exception["allow"] for exception in rules.get("exceptions", [])}
    for package in packages:
        private = package["publish"] == [] and rules["private"]["ignore"]
        allowed = {*rules["allow"], *exceptions.get(package["name"], [])}
        if not private and not satisfied(package["license"] or "none", allowed):
            yield f"{named(package)}: licence {package['license']} is not allowed"
    for name in exceptions.keys() - {package["name"] for package in packages}:
        yield f"{name}: has an exception and is no dependency any more"


def ban_breaches(rules, packages, features):
    for ban in rules["deny"]:
        found = [package for package in packages if package["name"] == ban["crate"]]
        if not ban.get("deny-multiple-versions"):
            yield from (f"{named(package)}: is banned" for package in found)
        elif len(found) > 1:
            yield f"{' and '.join(map(named, found))}: one version is allowed"
    for ban in rules.get("features", []):
        for package in packages:
            if package["name"] == ban["crate"]:
                banned = features[package["id"]].intersection(ban["deny"])
                yield from (f"{named(package)}: feature {feature} is banned" for feature in sorted(banned))
    for package in packages:
        for needed in package["dependencies"]:
            ours = rules["allow-wildcard-paths"] and needed.get("path")
            if rules["wildcards"] == "deny" and needed["req"] == "*" and not ours and needed["kind"] != "dev":
                yield f"{named(package)}: takes any version of {needed['name']}"


def source_breaches(packages):
    for package in packages:
        ours = package["source"] is None and ROOT in Path(package["manifest_path"]).parents
        if not ours and package["source"] != REGISTRY:
            yield f"{named(package)}: comes from {package['source'] or package['manifest_path']}"


def unknown_rules(deny):
    for section, rules in deny.items():
        yield from (f"deny.toml: {section}.{key} is not held here" for key in rules.keys() - KNOWN.get(section, set()))
    for ban in deny["bans"]["deny"]:
        yield from (f"deny.toml: bans.deny.{key} is not held here" for key in ban.keys() - KNOWN_OF_A_BAN)


def named(package):
    return f"{package['name']} {package['version']}"


def main():
    deny = tomllib.loads((ROOT / "deny.toml").read_text())
    by_id, features = graph(deny["graph"]["targets"])
    packages = sorted(by_id.values(), key=named)
    breaches = [
        *unknown_rules(deny),
        *licence_breaches(deny["licenses"], packages),
        *ban_breaches(deny["bans"], packages, features),
        *source_breaches(packages),
    ]
    for breach in breaches:
        print(breach)
    print(f"{len(packages)} packages, {len(breaches)} breaches of deny.toml")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
