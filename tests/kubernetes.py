#!/usr/bin/env python3
"""The files in admin/deploy/kubernetes, without a cluster.

    cargo build --release && python3 tests/kubernetes.py

Holds each resource against the schemas of several versions of Kubernetes
(kubernetes-validate of PyPI, installed into a folder of its own), compares what
they say of each other, and has the server check its settings. Exits 1 where
something is wrong.
"""
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.parse
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = ROOT / "target/release/mb-server"
FOLDER = ROOT / "admin/deploy/kubernetes"
VALIDATE = "kubernetes-validate==1.37.0"
# The oldest with volumes of images, and the newest.
VERSIONS = ["1.33", "1.37"]


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, **options)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        venv.create(folder / "venv", with_pip=True)
        run(folder / "venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", VALIDATE)
        # The rest needs its YAML.
        run(folder / "venv/bin/python", __file__, "--installed", folder)


def installed(folder):
    import yaml
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    listed = kustomization["resources"]
    there = sorted(file.name for file in FOLDER.glob("*.yaml") if file.name != "kustomization.yaml")
    assert sorted(listed) == there, f"kustomization.yaml lists {sorted(listed)}, there are {there}"
    for version in VERSIONS:
        for name in listed:
            run(folder / "venv/bin/kubernetes-validate", "--strict", "--quiet", "-k", version, FOLDER / name)
    resources = {}
    for name in listed:
        for resource in yaml.safe_load_all((FOLDER / name).read_text()):
            resources[resource["kind"]] = resource
    agree(resources)
    settings(folder, resources["ConfigMap"]["data"]["mb.toml"])
    print(f"{len(resources)} resources fit Kubernetes {' and '.join(VERSIONS)} and each other; the settings are right")


def agree(resources):
    """What one resource says of another is so."""
    import tomllib
    toml = tomllib.loads(resources["ConfigMap"]["data"]["mb.toml"])
    deployment = resources["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    [container] = pod["containers"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        resources["Service"]["spec"]["selector"],
        resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors), selectors
    target = resources["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", resources["Deployment"]["metadata"]["name"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"services": toml["tls"]["port"], "admin": toml["admin"].get("port", 9090)}, ports
    policy = resources["NetworkPolicy"]["spec"]
    allowed = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    assert sorted(allowed) == sorted(ports), allowed
    store = urllib.parse.urlsplit(toml["store"]["url"])
    to_store = [rule for rule in policy["egress"] if {"protocol": "TCP", "port": store.port} in rule["ports"]]
    [[peer]] = [rule["to"] for rule in to_store]
    # A name of the same namespace, and pods of the same.
    assert peer == {"podSelector": {"matchLabels": {"app.kubernetes.io/name": store.hostname}}}, peer
    assert store.scheme == "rediss" and store.password is None, "what goes to the store is encrypted"
    assert resources["Service"]["spec"]["ports"][0]["targetPort"] in ports
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
        get = container[probe]["httpGet"]
        assert get["port"] in ports and get["path"] in ["/readyz", "/healthz"], get
    seconds = lambda text: int(text.removesuffix("s"))
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"] + seconds(toml["drain_timeout"])
    assert pod["terminationGracePeriodSeconds"] > waits, waits
    mebibytes = lambda text: int(text.removesuffix("MiB").removesuffix("Mi"))
    limit = mebibytes(container["resources"]["limits"]["memory"])
    assert limit >= mebibytes(toml["memory"]) + 128, "the limit leaves no room for what memory does not count"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    files = [toml["tokens"], toml["services_dir"], toml["tls"]["cert"], toml["tls"]["key"], container["args"][-1],
             toml["store"]["password_file"], toml["store"]["ca"]]
    commands = [(FOLDER / "deployment.yaml").read_text(), (ROOT / "admin/DEPLOYING.md").read_text()]
    for file in files:
        assert any(file == at or file.startswith(at + "/") for at in mounts), f"{file} is in no volume"
        name = file.removeprefix("/secrets/")
        assert name == file or all(f"--from-file={name}" in text for text in commands), f"no command makes {name}"


def settings(folder, text):
    """The server takes the settings, with files of this machine."""
    (folder / "mb.toml").write_text(text)
    run(SERVER, "cert", "dev", folder / "certs", stdout=subprocess.DEVNULL)
    (folder / "state").mkdir(mode=0o700)
    (folder / "store.password").touch(mode=0o600)
    here = {
        "MB_TOKENS": folder / "tokens.json", "MB_STATE_DIR": folder / "state",
        "MB_SERVICES_DIR": ROOT / "services/dist",
        "MB_TLS__CERT": folder / "certs/server.crt", "MB_TLS__KEY": folder / "certs/server.key",
        "MB_STORE__PASSWORD_FILE": folder / "store.password", "MB_STORE__CA": folder / "certs/ca.crt",
    }
    run(SERVER, "token", "new", "ann", "--right", "*", "--file", folder / "tokens.json", stdout=subprocess.DEVNULL)
    run(SERVER, "check", "--config", folder / "mb.toml", stdout=subprocess.DEVNULL,
        env={**os.environ, **{name: str(value) for name, value in here.items()}})


if sys.argv[1:2] == ["--installed"]:
    installed(pathlib.Path(sys.argv[2]))
else:
    main()
