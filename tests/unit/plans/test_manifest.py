import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from services.common.errors import Code, FedmeshError
from services.plans.algorithms import FedAvg, GradientDescent, InstalledFamily
from services.plans.encoding import Encoding
from services.plans.library import plan_names
from services.plans.manifest import (
    canonical_bytes,
    load_manifest,
    parse_manifest,
    plan_id,
)
from services.secure_sum.parameters import DEFAULT, parameter_set_names, public_key_sets
from tests.support import family_plans
from tests.support.family_plans import DOCUMENTS
from tests.support.tiny_plan import FEDAVG, PRIVATE, changed, manifest, wire

PLANS = Path(__file__).parents[3] / "plans"
PLAN_YAML = """
format: fedmesh.plan/v1
name: tiny
model: {family: logistic}
algorithm: {kind: fedavg, local_steps: 1, learning_rate: 1e-1}
privacy: null
rounds: {count: 1}
encoding: {scale: 1024}
metrics: null
feature_schema: schema.yaml
features: [change]
"""
SCHEMA_YAML = """
name: tiny
patient_id: patient
encounter_id: encounter
label: {name: outcome, positive: [yes], negative: [no]}
split: {train: 1, validation: 0, test: 0, salt: s}
columns:
  - {kind: flag, name: change, "true": [Yes], "false": [No]}
"""


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(FedmeshError) as caught:
        parse_manifest(wire(document))
    assert caught.value.code is Code.PLAN_INVALID
    return caught.value.message


@pytest.mark.parametrize("name", plan_names())
def test_shipped_plans_survive_the_wire(name: str) -> None:
    plan = load_manifest(PLANS / f"{name}.yaml")
    data = canonical_bytes(plan)
    assert parse_manifest(data) == plan
    assert plan_id(parse_manifest(data)) == plan_id(plan)
    assert len(plan_id(plan)) == 64


def test_id_depends_on_every_field_and_on_nothing_else() -> None:
    plan = manifest(PRIVATE)
    reordered = dict(reversed(list(PRIVATE.items())))
    assert plan_id(manifest(reordered)) == plan_id(plan)
    assert plan_id(manifest(changed(PRIVATE, "privacy.clip_norm", 1))) == plan_id(plan)
    assert plan_id(manifest(changed(PRIVATE, "privacy.clip_norm", 1.5))) != plan_id(plan)
    assert plan_id(manifest(changed(PRIVATE, "feature_schema.columns.0.centre", 51))) != plan_id(plan)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("surprise", 1, ["unknown field surprise", "allowed:", "algorithm"]),
        ("checks", {"subgroups": [{"column": "sex"}]}, ["checks.subgroups: sex is no column of the schema"]),
        ("checks", {"subgroups": [{"column": "age"}]}, ["checks.subgroups: age needs bands"]),
        ("checks", {"subgroups": [{"column": "ward", "bands": [1]}]}, ["checks.subgroups: ward takes no bands"]),
        ("checks", {"subgroups": [{"column": "age", "bands": [2, 1]}]}, ["bands must ascend"]),
        ("checks", {"subgroups": [{"column": "ward"}] * 2}, ["a column appears twice"]),
        ("checks", {"largest_attack_auc": 0.4}, ["largest_attack_auc = 0.4", "0.5"]),
        ("algorithm.speed", 1, ["algorithm.gradient_descent.speed", "learning_rate"]),
        ("feature_schema.columns.0.mean", 1, ["unknown field", "mean", "centre"]),
        ("privacy.epsilon", -1, ["privacy.epsilon = -1", "greater than 0"]),
        ("privacy.epsilon", 0, ["privacy.epsilon = 0", "greater than 0"]),
        ("privacy.epsilon", 10.5, ["privacy.epsilon = 10.5", "less than or equal to 10"]),
        ("privacy.epsilon", float("nan"), ["privacy.epsilon", "finite"]),
        ("privacy.delta", 0.5, ["privacy.delta = 0.5", "0.001"]),
        ("privacy.clip_norm", float("inf"), ["privacy.clip_norm", "finite"]),
        ("privacy.colluders", 5, ["privacy.colluders = 5", "less than or equal to 4"]),
        ("privacy.colluders", -1, ["privacy.colluders = -1", "greater than or equal to 0"]),
        ("privacy.unit", "encounter", ["privacy.unit", "patient"]),
        ("algorithm.learning_rate", True, ["algorithm.gradient_descent.learning_rate = true"]),
        ("algorithm.learning_rate", "0.5", ["learning_rate", "valid number"]),
        ("algorithm.momentum", 1, ["momentum = 1", "less than 1"]),
        ("algorithm.kind", "adam", ["adam", "fedavg", "gradient_descent"]),
        ("rounds.count", 10001, ["rounds.count = 10001", "10000"]),
        ("rounds.count", 2.5, ["rounds.count = 2.5"]),
        ("encoding.lanes", 3, ["encoding.lanes = 3"]),
        ("encoding.scale", 1, ["encoding.scale = 1", "at least 32"]),
        ("encoding.scale", 2**31, ["encoding.scale", "at most 2^30"]),
        ("encoding.parameter_set", "ckks", ["parameter_set", "bfv-n4096-q60-t48-v2"]),
        ("features", ["age", "height"], ["unknown feature height", "age, visits, ward, urgent"]),
        ("features", ["age", "age"], ["age appear twice"]),
        ("features", [], ["features = []"]),
        ("metrics.epsilon", None, ["metrics.epsilon", "required with privacy"]),
        ("metrics.logit_range", [1, 1], ["logit_range"]),
        ("feature_schema.split.train", 0.9, ["must be 1"]),
        ("feature_schema.columns.0.maximum", -1, ["minimum", "below maximum"]),
        ("feature_schema.columns.2.reference", "z", ["reference 'z'"]),
        ("feature_schema.columns.3.true", ["No"], ["both true and false"]),
        ("feature_schema.columns.3.name", "patient", ["patient"]),
        ("feature_schema.label.negative", ["yes"], ["both positive and negative"]),
        ("model", ..., ["model: field required"]),
    ],
)
def test_wrong_fields_are_named(path: str, value: object, expected: list[str]) -> None:
    message = refused(changed(PRIVATE, path, value))
    for text in expected:
        assert text in message


@pytest.mark.parametrize("name", ["fedprox", "fedadam", "fedyogi"])
def test_several_local_steps_are_refused_with_privacy(name: str) -> None:
    for algorithm in (FEDAVG["algorithm"], DOCUMENTS[name]["algorithm"]):
        message = refused(changed(PRIVATE, "algorithm", algorithm))
        assert f"algorithm.kind = '{algorithm['kind']}' is refused with privacy" in message
        assert "several local steps" in message
        assert "'gradient_descent' (one noised and charged step a round) or 'ridge'" in message


@pytest.mark.parametrize(
    ("name", "path", "value", "expected"),
    [
        ("ridge", "model", {"family": "mlp", "hidden": [4]}, "'ridge' solves linear models only"),
        ("ridge", "model.l2", 0, "model.l2 must be above 0"),
        ("ridge", "rounds.count", 2, "rounds.count = 2: algorithm.kind = 'ridge' needs exactly 1 round"),
        ("ridge", "metrics", {"score_bins": 8}, "before the only round nothing has been learnt"),
        ("ridge-private", "encoding.scale", 2**33, "at most 2^30"),
        ("ridge", "encoding.scale", 2.0**40, "must fit 48-bit lanes"),
        ("fedprox", "model.hidden", [], "model.mlp.hidden = []"),
        ("fedprox", "model.hidden", [4, 4, 4], "at most 2 items"),
        ("fedprox", "model.activation", "gelu", "'relu' or 'tanh'"),
        ("fedprox", "model.layers", 3, "unknown field model.mlp.layers; allowed: activation, family, hidden"),
        ("fedprox", "algorithm.mu", ..., "algorithm.fedprox.mu: field required"),
        ("fedprox", "personalisation", {"proximal_weights": [1]}, "personalisation must be null"),
        ("fedprox", "algorithm.kind", "sum_only", "unknown field"),
        ("fedadam", "algorithm.server_learning_rate", ..., "algorithm.fedadam.server_learning_rate: field required"),
        ("fedyogi", "algorithm.beta2", 1, "algorithm.fedyogi.beta2 = 1"),
        ("fedyogi", "algorithm.tau", 0, "algorithm.fedyogi.tau = 0"),
        ("mlp-private", "model.hidden", [1024, 1024], "at least 4112 integer units for 1056769 coordinates"),
        ("weighted-private", "algorithm.family", "../x", "algorithm.installed.family"),
        ("weighted-private", "algorithm.parameters", {"a": [1]}, "algorithm.installed.parameters.a"),
    ],
)
def test_what_a_family_needs_is_said(name: str, path: str, value: object, expected: str) -> None:
    assert expected in refused(changed({**DOCUMENTS[name], "name": name}, path, value))


def test_parameters_of_an_installed_family_survive_the_wire() -> None:
    plan = manifest(changed(DOCUMENTS["weighted-private"], "algorithm.parameters", {"b": 2, "a": "text", "c": True}))
    assert parse_manifest(canonical_bytes(plan)) == plan
    assert isinstance(plan.algorithm, InstalledFamily)
    assert plan.algorithm.parameters == {"a": "text", "b": 2.0, "c": True}
    assert plan.algorithm.parameters["c"] is True


def test_lengths_of_the_families() -> None:
    plans = family_plans.PLANS
    assert plans["fedadam"].weights_length == (5 + 1) * 8 + (8 + 1) * 4 + 4 + 1
    assert plans["fedadam"].train_length == plans["fedadam"].weights_length + 1
    assert plans["ridge"].train_length == 21 + 6
    assert plans["weighted-private"].train_length == 6


def test_scaling_by_the_data_is_refused_with_privacy() -> None:
    assert "which no noise covers" in refused(changed(PRIVATE, "standardisation", "local"))
    assert manifest(changed(FEDAVG, "standardisation", "local")).standardisation == "local"


def test_metrics_budget_without_privacy_is_refused() -> None:
    assert "must be null when privacy is null" in refused(changed(FEDAVG, "metrics.epsilon", 0.5))


def test_sums_that_cannot_fit_a_lane_are_refused() -> None:
    document = changed(PRIVATE, "encoding", {"lanes": 2, "scale": 2**17})
    assert "24-bit lanes" in refused(document)


def test_a_plan_chooses_among_the_sets_that_this_release_knows() -> None:
    names = get_args(Encoding.model_fields["parameter_set"].annotation)
    assert names == parameter_set_names()
    for name in names:
        plan = manifest(changed(PRIVATE, "encoding.parameter_set", name))
        assert parse_manifest(canonical_bytes(plan)).encoding.parameters.name == name
    assert manifest(PRIVATE).encoding.parameters is DEFAULT


def test_a_set_with_narrower_lanes_bounds_the_scale() -> None:
    fits = manifest(changed(PRIVATE, "encoding", {"lanes": 2, "scale": 20_000}))
    assert fits.encoding.bits == 24
    document = changed(PRIVATE, "encoding", {"lanes": 2, "scale": 20_000, "parameter_set": public_key_sets()[0]})
    assert "must fit 22-bit lanes" in refused(document)


def test_wire_form_is_canonical_and_bounded() -> None:
    data = canonical_bytes(manifest(PRIVATE))
    with pytest.raises(FedmeshError, match="canonical"):
        parse_manifest(json.dumps(json.loads(data), indent=1).encode())
    with pytest.raises(FedmeshError, match="canonical"):
        parse_manifest(data.replace(b'{"algorithm"', b'{"name":"other","algorithm"', 1))
    with pytest.raises(FedmeshError, match="larger than"):
        parse_manifest(b" " * (1 << 21))
    for garbage in (b"", b"\xff\xfe", b"[]", b"null", b"[" * 100_000):
        with pytest.raises(FedmeshError) as caught:
            parse_manifest(garbage)
        assert caught.value.code is Code.PLAN_INVALID


def test_yaml_means_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA_YAML)
    (tmp_path / "plan.yaml").write_text(PLAN_YAML)
    plan = load_manifest(tmp_path / "plan.yaml")
    # YAML 1.1 would read 1e-1 as text and yes, no, Yes, No as booleans.
    assert isinstance(plan.algorithm, GradientDescent | FedAvg)
    assert plan.algorithm.learning_rate == 0.1
    assert plan.feature_schema.label.positive == ("yes",)
    assert plan.feature_schema.columns[0].name == "change"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLAN_YAML.replace("schema.yaml", "nowhere.yaml"), "no such file"),
        (PLAN_YAML + "name: again\n", "'name' appears twice"),
        (PLAN_YAML + "x: &a [1]\ny: *a\n", "aliases"),
        (PLAN_YAML + "x: !!python/object:os.system {}\n", "not valid YAML"),
        (PLAN_YAML + "x: {\n", "not valid YAML at line"),
        ("- a list\n", "mapping"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA_YAML)
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(FedmeshError, match=expected) as caught:
        load_manifest(tmp_path / "plan.yaml")
    assert caught.value.code is Code.PLAN_INVALID
    assert str(tmp_path) not in caught.value.message


def test_plan_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match="cannot read"):
        load_manifest(tmp_path / "none.yaml")
    (tmp_path / "plan.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(FedmeshError, match="UTF-8"):
        load_manifest(tmp_path / "plan.yaml")


def test_lengths_and_sensitivities() -> None:
    private, plain = manifest(PRIVATE), manifest(FEDAVG)
    assert private.feature_names == ("age", "visits", "ward=heart", "ward=others", "urgent")
    assert private.weights_length == 6
    assert private.vector_length == 6 + 2 * 8
    assert plain.vector_length == 6 + 1 + 2 * 32 + 1
    assert (private.train_sensitivity, private.metrics_sensitivity) == (4096, 16)
    assert (plain.train_sensitivity, plain.metrics_sensitivity) == (0, 0)
    assert private.metrics_rounds == (2, 4)
    assert manifest(changed(PRIVATE, "rounds.count", 3)).metrics_rounds == (2, 3)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("services.plans.manifest", ["numpy", "tensorflow", "tensorflow_federated"]),
        ("services.hospital_node.sources.reader", ["tensorflow", "tensorflow_federated"]),
        ("services.hospital_node.training.trainer", ["tensorflow", "tensorflow_federated"]),
    ],
)
def test_imports_stay_light(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
