"""Tests of compose/: the files match their schemas, and all services except Grafana run without containers."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import urllib.request
from pathlib import Path

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose" / "compose.yaml"
DOCKERFILE = ROOT / "compose" / "Dockerfile"
SERVICE = ROOT / "compose" / "gradestore.service"
KUBERNETES = "1.33"
# systemd's exposure level: 0 is a service without any permission, 100 one with all.
EXPOSURE_MAX = 15
TOOLS = ROOT / ".tools"
sys.path[:0] = [str(ROOT / "load"), str(ROOT / "dashboards")]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import containers  # noqa: E402
from measure import PROGRAM, SERVER, PASSWORD, AUTH  # noqa: E402
from show import until  # noqa: E402
from test_dashboards import rules as alert_rules  # noqa: E402

PROGRAMS = {
    "gradestore": (containers.entrypoint(DOCKERFILE), {"/gradestore": PROGRAM}),
    "nats": ([], {"/opt/bin/nats-server": SERVER}),
    "prom/prometheus": (["prometheus"], {"/opt/bin/prometheus": TOOLS / "prometheus" / "prometheus"}),
    "grafana/k6": (["k6"], {"/opt/bin/k6": TOOLS / "bin" / "k6"}),
}
# Latency is not tested here.
LIGHT = {"RATE": "40", "DURATION": "2s", "P99_MS": "5000"}
REPLICAS = ["one", "two", "three"]
SECRETS = {"./secrets/gradestore_password": PASSWORD + "\n"}


def ask(url, **more):
    return urllib.request.urlopen(urllib.request.Request(url, **more), timeout=10)


def schema(name, path):
    return subprocess.run([TOOLS / "ops" / "bin" / "check-jsonschema", "--builtin-schema", name, path],
                          capture_output=True, text=True)


class RunningServices(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.network = containers.Network()

    def setUp(self):
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.compose = containers.Compose(COMPOSE, PROGRAMS, SECRETS, LIGHT, self.network, directory)
        self.addCleanup(self.compose.kill_all)
        self.services = self.compose.services

    def url(self, name, port, path):
        return f"http://{self.services[name].address}:{port}{path}"

    def test_services_start_serve_recover_and_stop(self):
        self.compose.up("k6")
        self.compose.up("prometheus")

        # A write on the first node is readable on the third.
        response = ask(self.url("one", 8080, "/set"), data=b'{"user_id":"alice","spp":5}',
                      headers={"Authorization": f"Basic {AUTH}", "Content-Type": "application/json"})
        position = response.headers["Grade-Position"]
        read = ask(self.url("three", 8081, "/get?user_id=alice"), headers={"Grade-Position": position})
        self.assertEqual(json.load(read)["spp"], 5)
        for name in REPLICAS:
            status = json.load(ask(self.url(name, 8082, "/status")))
            self.assertEqual(status["log_kind"], "jetstream")

        # The smoke test passes.
        k6 = self.services["k6"]
        output = k6.child.stdout.read().decode()
        self.assertEqual(k6.child.wait(), 0, output + k6.log.read_text())
        self.assertIn("k6 smoke: 3 nodes", output)

        # Prometheus scrapes all nodes and has loaded the alerts.
        api = self.url("prometheus", 9090, "/api/v1")

        def not_up():
            targets = json.load(ask(f"{api}/targets"))["data"]["activeTargets"]
            health = {target["labels"]["instance"]: target["health"] for target in targets}
            if health != {f"{name}:8082": "up" for name in REPLICAS}:
                return f"targets: {health}"

        until(not_up)
        rules = json.load(ask(f"{api}/rules"))["data"]["groups"][0]["rules"]
        self.assertEqual([rule["name"] for rule in rules], [rule["alert"] for rule in alert_rules()])

        # Only the nodes can reach NATS, which has no password.
        self.assertIn("nats", self.compose.reachable_from("one"))
        self.assertNotIn("nats", self.compose.reachable_from("k6"))

        # A killed node restarts with its data.
        self.services["two"].kill()
        self.services["two"].start()
        self.services["two"].until_healthy()
        found = ask(self.url("two", 8081, "/get?user_id=alice"), headers={"Grade-Position": position})
        self.assertEqual(json.load(found)["spp"], 5)

        # A health check fails without its service.
        with self.assertRaises(AssertionError):
            self.services["nats"].kill()
            self.services["nats"].until_healthy()

        for name in (*REPLICAS, "prometheus"):
            service = self.services[name]
            self.assertEqual(service.stop(), 0, service.log.read_text())
        for name in REPLICAS:
            self.assertTrue(list((self.compose.directory / "volumes" / name).iterdir()), f"no snapshot of {name}")

    def test_the_pods_become_ready_and_stop(self):
        # The containers of three pods, started together, with the NATS server of the compose file.
        stateful_set, = (manifest for manifest in kubernetes_manifests() if manifest["kind"] == "StatefulSet")
        self.assertEqual(stateful_set["spec"]["podManagementPolicy"], "Parallel")
        container, = stateful_set["spec"]["template"]["spec"]["containers"]
        data, password = container["volumeMounts"]
        # The same path and file in both.
        self.assertEqual((password["mountPath"], list(SECRETS)[0]), ("/run/secrets", "./secrets/gradestore_password"))
        pods = [self.services[name] for name in REPLICAS]
        self.assertEqual(stateful_set["spec"]["replicas"], len(pods))
        for pod in pods:
            pod.definition |= {
                "command": container["args"],
                "environment": {variable["name"]: variable["value"] for variable in container["env"]},
                "volumes": [f"{pod.name}:{data['mountPath']}"],
                "read_only": container["securityContext"]["readOnlyRootFilesystem"],
            }
            self.compose.start(pod.name)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for pod in pods:
            pod.until_healthy()
            for probe in ("livenessProbe", "readinessProbe"):
                target = container[probe]["httpGet"]
                self.assertEqual(ask(self.url(pod.name, ports[target["port"]], target["path"])).status, 200)
        for pod in pods:
            self.assertEqual(pod.stop(), 0)


def kubernetes_manifests():
    return list(yaml.safe_load_all((ROOT / "compose" / "kubernetes.yaml").read_text()))


class Files(unittest.TestCase):
    file = containers.read(COMPOSE, {})

    def test_the_compose_file_matches_its_schema(self):
        result = schema("vendor.compose-spec", COMPOSE)
        self.assertEqual(result.returncode, 0, result.stdout)
        with tempfile.TemporaryDirectory() as directory:
            wrong = Path(directory) / "compose.yaml"
            wrong.write_text(COMPOSE.read_text().replace("service_healthy", "service_is_fine"))
            self.assertNotEqual(schema("vendor.compose-spec", wrong).returncode, 0)

    def test_versions_are_pinned_and_the_same_as_in_the_tests(self):
        def pinned(image):
            return re.search(rf"(?<![\w/]){image}:v?(\d+\.\d+\.\d+)", COMPOSE.read_text() + DOCKERFILE.read_text())[1]

        for service in self.file["services"].values():
            self.assertRegex(service["image"], r":v?\d+\.\d+\.\d+(-alpine)?$")
        self.assertIn(f"NATS_SERVER={pinned('nats')}\n", (ROOT / "tests" / "install-nats.sh").read_text())
        self.assertIn(f"K6={pinned('grafana/k6')}\n", (ROOT / "load" / "install-k6.sh").read_text())
        cargo = (ROOT / "Cargo.toml").read_text()
        self.assertTrue(pinned("rust").startswith(re.search(r'rust-version = "(.*)"', cargo)[1]))
        self.assertEqual(pinned("gradestore"), re.search(r'^version = "(.*)"', cargo, re.MULTILINE)[1])

    def test_each_service_drops_its_privileges(self):
        for name, service in self.file["services"].items():
            self.assertEqual(service["cap_drop"], ["ALL"], name)
            self.assertEqual(service["security_opt"], ["no-new-privileges:true"], name)
            for port in service.get("ports", []):
                self.assertTrue(port.startswith("127.0.0.1:"), f"{name} listens on all addresses: {port}")

    def test_grafana_has_its_dashboards_and_datasource(self):
        grafana = self.file["services"]["grafana"]
        mounted = {target: COMPOSE.parent / source for source, target in (volume.split(":")[:2] for volume in grafana["volumes"])}
        provisioning = mounted["/etc/grafana/provisioning"]
        provider = yaml.safe_load((provisioning / "dashboards" / "gradestore.yml").read_text())["providers"][0]
        self.assertTrue(list(mounted[provider["options"]["path"]].glob("*.json")))
        datasource = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
        self.assertEqual(datasource["url"], "http://prometheus:9090")
        self.assertEqual(datasource["jsonData"]["timeInterval"],
                         yaml.safe_load((COMPOSE.parent / "prometheus.yml").read_text())["global"]["scrape_interval"])

    def test_the_image_copies_all_files_that_cargo_requires(self):
        with tempfile.TemporaryDirectory() as directory:
            for copied in re.findall(r"^COPY ([^-].*)$", DOCKERFILE.read_text(), re.MULTILINE):
                *sources, to = copied.split()
                for source in sources:
                    target = Path(directory, to, source if to == "./" else "")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
            tree = subprocess.run(["cargo", "tree", "--locked", "--offline", "--package", "gradestore"], cwd=directory,
                                  capture_output=True, text=True)
            self.assertEqual(tree.returncode, 0, tree.stderr)

    def test_the_manifests_match_their_schemas(self):
        for manifest in kubernetes_manifests():
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        self.assertEqual([manifest["kind"] for manifest in kubernetes_manifests()], ["Service", "PodDisruptionBudget", "StatefulSet"])
        manifest["spec"]["template"]["spec"]["containers"][0]["arguments"] = ["serve"]
        with self.assertRaises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)

    def test_the_systemd_unit_is_valid_and_restricted(self):
        text = SERVICE.read_text()
        with tempfile.TemporaryDirectory() as directory:
            # systemd-analyze requires an existing program.
            unit = Path(directory) / "gradestore.service"
            unit.write_text(text.replace("/usr/local/bin/gradestore", str(Path(PROGRAM).resolve())))
            for command in (["verify", "--man=no"], ["security", "--offline=true", f"--threshold={EXPOSURE_MAX}"]):
                result = subprocess.run(["systemd-analyze", *command, unit], capture_output=True, text=True)
                self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)

    def test_the_command_of_the_systemd_unit_starts_a_node(self):
        text = SERVICE.read_text()
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "password").write_text(PASSWORD)
            env = dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE))
            env = {name: value.replace("%S", directory).replace("%d", directory) for name, value in env.items()}
            _, *flags = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1].split()
            # The default ports are free in this network namespace.
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            with subprocess.Popen([PROGRAM, *flags], env=env, stderr=subprocess.DEVNULL) as child:
                until(lambda: subprocess.run([PROGRAM, "health"], capture_output=True, text=True).stderr)
                self.assertTrue((Path(directory) / "gradestore").is_dir())
                child.terminate()
            self.assertEqual(child.returncode, 0)


if __name__ == "__main__":
    unittest.main()
