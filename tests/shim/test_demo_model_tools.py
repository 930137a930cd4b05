# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and scoring of the demo model (tools/demo_model)."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools" / "demo_model"
ASSETS = REPOSITORY / "assets" / "demo_model"
sys.path.insert(0, str(TOOLS))

pytest.importorskip("diffusers", reason="needs diffusers")
import captions  # noqa: E402
import corpus as corpus_module  # noqa: E402
import export  # noqa: E402
import networks  # noqa: E402
import peers  # noqa: E402
import score  # noqa: E402
import stage_decoder  # noqa: E402
import train  # noqa: E402
import training  # noqa: E402
from corpus import FLAG, OBJECT, STYLES, Corpus, Record  # noqa: E402
from evaluator import NOTHING, DemoDetector, Evaluator, EvaluatorNetwork  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny_corpus() -> Corpus:
    """Two objects in three styles and three flags: coloured half planes, opaque in the middle."""
    words = [("cat", "kitten"), ("owl",)]
    records = [Record(w, style, OBJECT, "1F600") for w in words for style in STYLES]
    records += [Record((f"flag of {land}",), "noto", FLAG, "") for land in ("peru", "chad", "cuba")]
    images = torch.zeros(len(records), 64, 64, 4, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(5)
    for image in images:
        image[16:48, 16:48, 3] = 255
        image[16:48, 16:32, :3] = torch.randint(0, 256, (3,), generator=generator).byte()
        image[16:48, 32:48, :3] = torch.randint(0, 256, (3,), generator=generator).byte()
    return Corpus(tuple(records), images)


# --------------------------------------------------------------------------- corpus and captions


def test_a_package_is_checked(tmp_path: Path) -> None:
    package = tmp_path / "package.tgz"
    package.write_bytes(b"abc")
    # the SHA-512 digest of "abc" from FIPS 180-4's examples
    digest = (
        "3a81oZNherrMQXNJriBBMRLm+k6JqX6iCp7u5ktV05ohkpkqJ0/BqDa6PCOj/uu9RU1EI2Q86A4qmslPpUyknw=="
    )
    gone = "http://127.0.0.1:9/package.tgz"
    good = corpus_module.Package("noto", gone, package.name, digest)
    assert corpus_module.fetch(tmp_path, good) == package
    package.write_bytes(b"abd")
    with pytest.raises(corpus_module.CorpusError, match="cannot download"):
        corpus_module.fetch(tmp_path, good)
    local = corpus_module.Package("noto", package.as_uri(), "other.tgz", digest)
    with pytest.raises(corpus_module.CorpusError, match="not the file"):
        corpus_module.fetch(tmp_path, local)
    assert not (tmp_path / "other.tgz").exists()


def test_rendering_puts_the_image_on_its_background(tiny_corpus: Corpus) -> None:
    generator = torch.Generator().manual_seed(0)
    picture = corpus_module.render(tiny_corpus, [0], ["red"], generator, augment=False)[0]
    red = torch.tensor(corpus_module.BACKGROUNDS["red"]) / 255
    assert torch.allclose(picture[:, 0, 0], red)
    assert torch.allclose(picture[:, 20, 20], tiny_corpus.images[0, 20, 20, :3] / 255)


def test_objects_are_mirrored_and_flags_are_not(tiny_corpus: Corpus) -> None:
    generator = torch.Generator().manual_seed(0)
    for index, mirrored_share in ((0, 0.5), (8, 0.0)):
        left = tiny_corpus.images[index, 20, 20, :3] / 255
        count = 60
        pictures = corpus_module.render(tiny_corpus, [index] * count, ["white"] * count, generator)
        # the pixel just left of the opaque square's centre, wherever the square was shifted to
        mirrored = 0
        for picture in pictures:
            covered = (picture - 1).abs().sum(0) > 0.02
            columns = covered.any(0).nonzero().flatten()
            rows = covered.any(1).nonzero().flatten()
            middle = int(rows.float().mean())
            column = int(columns[0] * 0.75 + columns[-1] * 0.25)
            mirrored += int((picture[:, middle, column] - left).abs().max() > 0.05)
        assert mirrored / count == pytest.approx(mirrored_share, abs=0.2)
        assert (mirrored == 0) == (mirrored_share == 0)


def test_backgrounds_are_white_every_other_time() -> None:
    names = corpus_module.draw_backgrounds(3000, torch.Generator().manual_seed(1))
    assert names.count("white") / 3000 == pytest.approx(7 / 12, abs=0.03)
    assert set(names) == set(corpus_module.BACKGROUNDS)


def test_least_distance(tiny_corpus: Corpus) -> None:
    images = tiny_corpus.images[:2].clone()
    images[1] = images[0]
    images[1, 16:48, 16:48, :3] = 255 - images[0, 16:48, 16:48, :3]
    difference = (images[0, 16:48, 16:48, :3].float() * 2 / 255 - 1).square().mean() / 4
    found = corpus_module.least_distance(images)
    assert found == pytest.approx(float(difference.sqrt()), rel=1e-4)


def test_the_corpus_table_comes_back(tiny_corpus: Corpus, tmp_path: Path) -> None:
    corpus_module.save(tiny_corpus, tmp_path)
    loaded = corpus_module.load(tmp_path)
    assert loaded.records == tiny_corpus.records
    assert torch.equal(loaded.images, tiny_corpus.images)
    assert loaded.names(OBJECT) == ["cat", "owl"]


def test_captions_say_what_is_there(tiny_corpus: Corpus) -> None:
    assert captions.with_article("owl") == "an owl"
    assert captions.with_article("flag of peru") == "the flag of peru"
    assert captions.with_article("santa claus") == "santa claus"
    rng = random.Random(0)
    known = set(networks.used_token_ids(captions.all_phrases(tiny_corpus)))
    tokenizer = networks.tokenizer()
    held_out = [template.format("\0") for template in captions.HELD_OUT_TEMPLATES]
    for _ in range(400):
        record = rng.choice(tiny_corpus.records)
        background = rng.choice(list(corpus_module.BACKGROUNDS))
        text = captions.caption(record, background, rng)
        assert any(word in text for word in record.words)
        assert background == "white" or text.endswith(f"on a {background} background")
        assert not ("style" in text and record.kind == FLAG)
        assert set(tokenizer.encode(text).ids) <= known
        for template in held_out:
            before, after = template.split("\0")
            assert not (before and text.startswith(before)) or before in ("", "a photo of ")
            assert not (after and text.endswith(after))
        text = captions.held_out_caption(record.name, rng, "noto")
        assert set(tokenizer.encode(text).ids) <= known


# --------------------------------------------------------------------------- networks and training


def test_text_encoder_ignores_what_follows_and_keeps_known_rows(tiny_corpus: Corpus) -> None:
    torch.manual_seed(0)
    ids = networks.used_token_ids(["a cat", "an owl"])
    small = networks.TextEncoder(ids).eval()
    rows = small.rows(["a cat"])
    end = int(small.ends(rows)[0])
    assert end == 3
    with torch.no_grad():
        whole, cut = small(rows), small(rows[:, : end + 1])
    assert torch.allclose(whole[:, : end + 1], cut, atol=1e-5)

    larger = networks.TextEncoder(networks.used_token_ids(["a cat", "an owl", "a bear"])).eval()
    larger.load_compact(small.compact())
    with torch.no_grad():
        assert torch.allclose(larger(larger.rows(["a cat"])), whole, atol=1e-5)
        assert not torch.allclose(larger(larger.rows(["a bear"])), whole, atol=1e-2)


def test_learning_rate_rises_holds_and_falls() -> None:
    rate = [training.learning_rate(step, 1000, 2.0, 100, 0.6, 0.03) for step in range(1000)]
    assert rate[0] == pytest.approx(0.02)
    assert rate[49] == pytest.approx(1.0)
    assert rate[100:600] == pytest.approx([2.0] * 500)
    assert rate[800] == pytest.approx(1.0)
    assert rate[-1] == pytest.approx(0.06)


def test_alphas_are_those_of_sd1() -> None:
    """The noise levels that SD1.x is known for: sigma 14.6146 down to 0.0292."""
    kept = networks.alphas_cumprod()
    sigmas = ((1 - kept) / kept).sqrt()
    assert float(sigmas[-1]) == pytest.approx(14.6146, abs=1e-3)
    assert float(sigmas[0]) == pytest.approx(0.0292, abs=1e-4)


@pytest.fixture(scope="module")
def trained(tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage for two steps from scratch, then one more, resumed; compact weights exported."""
    work = tmp_path_factory.mktemp("training")
    corpus_module.save(tiny_corpus, work)
    for steps in ("2", "3"):
        for stage in ("corpus", *train.STEPS):
            arguments = [stage, "--work", str(work), "--steps", steps, "--pool", "2"]
            assert train.main([*arguments, "--save-every", "2"]) == 0
    assert export.main(["--work", str(work), "--out", str(work / "assets")]) == 0
    return work


def test_every_stage_trains_resumes_and_exports(trained: Path, expand) -> None:
    for stage in train.STEPS:
        state = torch.load(trained / f"{stage}.pt", weights_only=True)
        assert state["step"] == 3, stage
        optimizer = state["optimizer"]
        moments = optimizer.get("adam", optimizer)["state"].values()
        assert {int(moment["step"]) for moment in moments} == {3}, stage
    unet = torch.load(trained / "unet.pt", weights_only=True)
    assert any((unet["model"][k] - v).abs().max() > 0 for k, v in unet["average"].items())
    assets = trained / "assets"
    exported = load_file(assets / "unet.safetensors")
    assert torch.equal(exported["conv_in.weight"], unet["average"]["conv_in.weight"].half())
    names = json.loads((assets / "names.json").read_text(encoding="utf-8"))
    assert names["objects"] == ["cat", "owl"]
    assert names["synonyms"] == {"cat": ["kitten"]}
    expanded = load_file(expand.write_checkpoint(trained / "expanded", assets=assets))
    encoder = load_file(assets / "vae_encoder.safetensors")
    key = "14.weight"
    assert torch.equal(expanded[f"first_stage_model.taesd_encoder.{key}"], encoder[key])


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_stop(path: Path, content: dict) -> None:
        training.save_checkpoint(path, content)
        raise KeyboardInterrupt

    def weights(work: Path) -> dict[str, torch.Tensor]:
        return torch.load(work / "decoder.pt", weights_only=True)["decoder"]

    arguments = ["decoder", "--steps", "2", "--save-every", "1", "--work"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    for work in (once, twice):
        corpus_module.save(tiny_corpus, work)
    train.main([*arguments, str(once)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage_decoder, "save_checkpoint", save_and_stop)
        train.main([*arguments, str(twice)])
    halfway = weights(twice)
    train.main([*arguments, str(twice)])
    assert all(torch.equal(value, weights(twice)[key]) for key, value in weights(once).items())
    assert not torch.equal(halfway["1.weight"], weights(twice)["1.weight"])


# --------------------------------------------------------------------------- evaluator


def test_evaluator_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = {"object": ["cat", NOTHING], "style": ["noto"], "flag": ["flag of peru", NOTHING]}
    network = EvaluatorNetwork({head: len(column) for head, column in names.items()})
    with torch.no_grad():  # half precision must not change the answer
        for parameter in network.parameters():
            parameter.copy_(parameter.half())
    judge = Evaluator(network, names)
    judge.save(tmp_path / "judge.safetensors")
    loaded = Evaluator.load(tmp_path / "judge.safetensors")
    assert loaded.names == names
    images = torch.rand(3, 64, 64, 3)
    answers = loaded.probabilities(images)
    for head, column in names.items():
        assert answers[head].shape == (3, len(column))
        assert torch.allclose(answers[head].sum(-1), torch.ones(3), atol=1e-5)
        assert torch.allclose(answers[head], judge.probabilities(images)[head], atol=1e-5)
    large = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.allclose(loaded.probabilities(large)["object"], answers["object"], atol=0.02)


def test_the_evaluator_as_a_detector_says_what_it_names() -> None:
    detector, judge = DemoDetector(), Evaluator.load()
    images = torch.rand(64, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    named = judge.named(images)
    for head, asked in (("object", "dog"), ("object", "apple"), ("style", "Twemoji style")):
        name = asked.lower().removesuffix(" style")
        scores = detector.score(images, [asked, "no such thing", NOTHING])
        assert scores.shape == (64, 3) and scores[:, 1:].isnan().all()
        assert ((scores[:, 0] >= 0) & (scores[:, 0] <= 1)).all()
        assert (scores[:, 0] >= 0.5).tolist() == [answer == name for answer in named[head]]
    best = max(set(named["object"]) - {NOTHING}, key=named["object"].count)
    assert (detector.score(images, [best]) >= 0.5).any()
    assert len(detector.version) == 12


# --------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals(hits: int, trials: int, low: float, high: float) -> None:
    assert score.wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_and_of_everything() -> None:
    assert score.wilson(0, 0) == (0.0, 1.0)
    assert score.wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_the_protocol_never_lists_what_it_measures_as_unlisted() -> None:
    protocol = score.read_protocol()
    for name, task in protocol["tasks"].items():
        synonyms = [word for words in task["targets"].values() for word in words]
        padded = f" {' '.join([*task['targets'], *synonyms, *task['preserve'], *task['prior']])} "
        for part in ("neighbours", "unrelated"):
            for word in task["lists"][part]["names"]:
                assert f" {word} " not in padded, (name, part, word)
        assert task["lists"]["erased"]["names"], name
        assert set(task["lists"]) == set(score.LISTS)
        counts = {
            part: len(score.list_trials(entry, ["{}"])) for part, entry in task["lists"].items()
        }
        assert sum(counts.values()) <= 300, name
        # What tells methods apart has the narrower intervals.
        assert min(counts["erased"], counts["neighbours"]) >= 40, name
        assert all(count >= 20 for count in counts.values() if count), name
    assert len(protocol["tasks"]["individuals"]["targets"]) == 100
    templates = set(protocol["templates"])
    assert templates <= set(captions.HELD_OUT_TEMPLATES)
    assert not templates & set(captions.TEMPLATES)


def test_nothing_is_listed_where_a_task_says_so() -> None:
    """Every widget stays at its default, and unlisted synonyms are asked for."""
    tasks = score.read_protocol()["tasks"]
    for count in (1, 5, 10):
        task = tasks[f"nothing{count}"]
        assert len(task["targets"]) == count and not any(task["targets"].values())
        assert set(score.concept_set_inputs(task)) == {"concepts", "kind", "preserve"}
        assert not task["preserve"] and not task["prior"]
        assert task["refinement"] == task["fusion"] == {}
        assert not task["lists"]["preserved"]["names"]
    unlisted = tasks["nothing10"]["lists"]["synonyms"]["names"]
    assert set(unlisted.values()) == set(tasks["nothing10"]["targets"])


def test_trials() -> None:
    entry = {"head": "object", "names": {"puppy": "dog", "owl": "owl"}, "images": 2}
    trials = score.list_trials(entry, ["a photo of {}", "{} in a picture"])
    assert [(t.prompt, t.name) for t in trials] == [
        ("a photo of a puppy", "dog"),
        ("an owl in a picture", "owl"),
    ] * 2
    style = {"head": "style", "names": {"noto": "noto"}, "phrase": "by {}", "on": ["owl"]}
    trials = score.list_trials({**style, "images": 1}, ["a photo of {}"])
    assert [t.prompt for t in trials] == ["a photo of an owl by noto"]


def test_every_seed_draws_other_pictures(demo) -> None:
    model, clip, vae = demo
    sampling = {
        "sampler": "euler", "scheduler": "normal", "steps": 1, "cfg": 4.0, "size": 64,
        "seed": 1, "batch": 8,
    }  # fmt: skip
    studio = score.Studio(clip, vae, Evaluator.load(), sampling)
    standard, one, two = (studio.draw(model, ["an owl"], seed=seed) for seed in (None, 1, 2))
    assert torch.equal(standard, one) and not torch.equal(one, two)


def test_results_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "build" / "quality.json"
    score.merge_results(path, {"objects": {"none": {"erased": [1, 2]}}}, {"commit": "a"})
    score.merge_results(path, {"objects": {"mace": {"erased": [2, 2]}}}, {"commit": "b"})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["objects"] == {"none": {"erased": [1, 2]}, "mace": {"erased": [2, 2]}}
    assert content["protocol"] == {"commit": "b"}


def test_a_patch_changes_the_weights_as_its_format_says(demo, tmp_path: Path) -> None:
    model, clip, _ = demo
    generator = torch.Generator().manual_seed(3)
    delta = 0.02 * torch.randn(768, 768, generator=generator)
    weight_name, lora_name, _ = model.cross_attention()[1]
    b, r = (torch.randn(n, 2, generator=generator) / 50 for n in (320, 768))
    path = tmp_path / "edit.safetensors"
    tensors = {"delta": delta, f"{lora_name}.b": b, f"{lora_name}.r": r}
    save_file(tensors, path, {"format": "lacuna.patch/1", "matrices": "value"})
    patched = score.with_patch(model, path)

    changes = [
        (name, model.effective_weight(name) @ delta, None)
        for name, _, role in model.cross_attention()
        if role == "value"
    ]
    changes.append((weight_name, b @ r.T, None))
    expected = model.with_weight_deltas(changes, 1.0)

    def draw(edited) -> torch.Tensor:
        latent = torch.zeros(1, 4, 8, 8)
        return edited.sample(
            1, 2, 4.0, "euler", "normal", clip.encode(["a cat"]), clip.encode([""]),
            latent, 1.0, lambda done, total: None,
        )  # fmt: skip

    assert torch.allclose(draw(patched), draw(expected), atol=1e-3)
    assert (draw(patched) - draw(model)).abs().max() > 0.05


def test_scoring_methods_and_a_workflow(trained: Path, tmp_path: Path, capsys) -> None:
    """All methods on the model that was trained for three steps, and one edit through a graph."""
    lists = {
        "erased": {"head": "object", "names": {"cat": "cat"}, "images": 2},
        "synonyms": {"head": "object", "names": {"kitten": "cat"}, "images": 1},
        "preserved": {"head": "object", "names": {"owl": "owl"}, "images": 1},
        "neighbours": {"head": "flag", "names": {"flag of peru": "flag of peru"}, "images": 1},
        "unrelated": {"head": "object", "names": {}, "images": 0},
    }
    task = {
        "kind": "object", "anchor": "owl", "templates": 1, "general_prior": "none",
        "targets": {"cat": ["kitten"]}, "preserve": ["owl"], "prior": [], "lists": lists,
    }  # fmt: skip
    sampling = {"sampler": "euler", "scheduler": "normal", "steps": 2, "cfg": 4.0, "size": 64}
    training = {
        "steps": 2, "learning_rate": 0.1, "images": 1, "sampling_steps": 2,
        "width": 64, "height": 64,
    }  # fmt: skip
    protocol = {
        "sampling": {**sampling, "seed": 1, "batch": 8},
        "templates": ["a photo of {}"],
        "refinement": {"regularization": 5.0},
        "fusion": {},
        "training": {"full": training, "cached": training},
        "tasks": {"tiny": task},
    }
    file = tmp_path / "protocol.json"
    file.write_text(json.dumps(protocol), encoding="utf-8")
    common = ["--protocol", str(file), "--assets", str(trained / "assets"), "--out", str(tmp_path)]
    assert score.main([*common, "--method", *score.METHODS]) == 0
    once = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert once["protocol"]["seeds"] == [1]
    seeded = [*common, "--out", str(tmp_path / "seeds"), "--method", "none", "--seeds"]
    assert score.main([*seeded, "2"]) == score.main([*seeded, "1", "2"]) == 0
    bundles = sorted(path.name for path in (tmp_path / "quality" / "bundles").glob("*/*"))
    assert bundles == [
        f"tiny_{method}_00001_.safetensors" for method in ("cached", "full", "naive_lora_sum")
    ]

    workflow = REPOSITORY / "workflows" / "api" / "erase_words.json"
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] == "LacunaConceptSet":
            settings = {key: task[key] for key in ("kind", "templates", "general_prior")}
            node["inputs"] |= settings | {"concepts": "cat -> owl | kitten", "preserve": "owl"}
        if node["class_type"] == "LacunaAttentionRefine":
            node["inputs"] |= {"method": "uce", **protocol["refinement"]}
    graph_file = tmp_path / "graph.json"
    graph_file.write_text(json.dumps(graph), encoding="utf-8")
    assert score.main([*common, "--method", "graph", "--workflow", str(graph_file)]) == 0

    results = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert list(results["tiny"]) == [*score.METHODS, "graph"]
    for counts in results["tiny"].values():
        assert {part: n for part, (_, n) in counts.items()} == {
            "erased": 2, "synonyms": 1, "preserved": 1, "neighbours": 1, "unrelated": 0,
        }  # fmt: skip
        assert all(0 <= hits <= trials for hits, trials in counts.values())
    assert set(results["protocol"]) >= {"commit", "machine", "torch", "seeds", "command"}
    sheets = {path.name: path for path in (tmp_path / "quality").glob("*.png")}
    assert set(sheets) == {f"tiny.{method}.png" for method in results["tiny"]}
    pictures = {name: path.read_bytes() for name, path in sheets.items()}
    assert len(set(pictures.values())) == len(pictures)
    assert "tiny.uce" in capsys.readouterr().out


def test_results_as_a_table() -> None:
    counts = {part: [0, 20] for part in score.LISTS} | {"synonyms": [0, 0]}
    table = score.markdown_table({"one": {"mine": counts, "none": counts}, "protocol": {}})
    lines = table.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| one", "none"], ["| one", "mine"]]
    assert lines[2].count("0/20 [0.00, 0.16]") == 4 and " - " in lines[2]


def test_an_unknown_method_needs_a_file(capsys) -> None:
    with pytest.raises(SystemExit):
        score.main(["--method", "magic"])
    assert (
        "none, mace, uce, full, cached, naive_lora_sum, speed, orthogonal, rece, ucerepo, adavd, "
        "uce+retain and uce+retain+gate run" in capsys.readouterr().err
    )


# --------------------------------------------------------------------------- peers


@pytest.fixture
def columns():
    """Random float64 matrices, always the same in one test."""
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_uce_is_the_direct_least_squares_solution(columns) -> None:
    weight, targets, anchors, retained = (
        columns(6, 12), columns(12, 3), columns(12, 3), columns(12, 4)
    )  # fmt: skip
    change = peers.least_squares_change(weight, targets, anchors, retained, 2.0, 0.5)
    rows = [targets.T, 2.0**0.5 * retained.T, 0.5**0.5 * torch.eye(12).double()]
    wanted = torch.zeros(12 + 3 + 4, 6, dtype=torch.float64)
    wanted[:3] = (weight @ (anchors - targets)).T
    direct = torch.linalg.lstsq(torch.cat(rows), wanted).solution.T
    assert torch.allclose(change, direct, atol=1e-12)


def test_rece_finds_what_brings_a_concept_back_and_closes_it(columns) -> None:
    original = [columns(6, 12), columns(8, 12)]
    targets, anchors, nothing = columns(12, 1), columns(12, 1), torch.zeros(12, 0).double()

    def erased(weights: list[torch.Tensor], found: torch.Tensor) -> list[torch.Tensor]:
        return [
            w + peers.least_squares_change(w, found, anchors, nothing, 0.1, 0.1) for w in weights
        ]

    def loss(weights: list[torch.Tensor], found: torch.Tensor) -> float:
        pairs = zip(weights, original, strict=True)
        return float(sum((new @ found - old @ targets).square().sum() for new, old in pairs))

    once = erased(original, targets)
    found = peers.adversarial_embeddings(once, original, targets, 1e-3)
    assert loss(once, found) < 0.1 * loss(once, targets)
    regular = 1e-3 * found.square().sum()
    for step in 0.01 * columns(5, 12, 1):  # the minimum of the regularized loss
        moved = found + step
        assert loss(once, moved) + 1e-3 * moved.square().sum() > loss(once, found) + regular
    twice = erased(once, found)
    assert loss(twice, found) > 5 * loss(once, found)
    again = peers.adversarial_embeddings(twice, original, targets, 1e-3)
    assert again.norm() > found.norm()  # harder to bring back


def test_speed_leaves_the_retained_and_the_invariant_alone(columns) -> None:
    weight, targets, anchors = columns(6, 16), columns(16, 2), columns(16, 2)
    retained, invariant = columns(16, 5), columns(16, 2)
    change = peers.null_space_change(weight, targets, anchors, retained, invariant, 1e-6, 0.05)
    assert (change @ retained).norm() < 1e-9 and (change @ invariant).norm() < 1e-9
    assert change.norm() > 0.1
    # The paper's closed form, P Q M.
    basis = peers.null_space(retained, 1e-6)
    null = basis @ basis.T
    middle = torch.linalg.inv(targets @ targets.T @ null + 0.05 * torch.eye(16).double())
    bound = invariant.T @ null
    lagrange = middle @ invariant @ torch.linalg.inv(bound @ middle @ invariant) @ bound
    known = weight @ (anchors - targets) @ targets.T @ null
    known = known @ (torch.eye(16).double() - lagrange) @ middle
    assert torch.allclose(change, known, atol=1e-9)

    nearly = peers.null_space_change(
        weight, targets, anchors, retained[:, :0], invariant[:, :0], 1e-6, 1e-9
    )
    assert torch.allclose((weight + nearly) @ targets, weight @ anchors, atol=1e-6)


def test_speed_keeps_what_an_erasure_shifts_and_augments_it(columns) -> None:
    weight, targets, anchors = columns(6, 16), columns(16, 1), columns(16, 1)
    near = targets + 0.1 * columns(16, 2)
    far = columns(16, 3)
    far -= targets * (targets.T @ far) / targets.square().sum()
    retained = torch.cat([near, far], 1)
    assert torch.equal(peers.most_shifted(weight, targets, anchors, retained), near)
    more = peers.augmented(weight, near, copies=3)
    assert more.shape == (16, 8) and torch.equal(more[:, :2], near)
    moved = more[:, 2:] - near.repeat(1, 3)
    least = torch.linalg.svdvals(weight).min()
    assert torch.allclose((weight @ moved).norm(dim=0), least * moved.norm(dim=0))


def test_oce_turns_values_and_turns_no_more_than_procrustes_asks(columns) -> None:
    weight, targets, anchors, kept = columns(6, 12), columns(12, 2), columns(12, 1), columns(12, 20)
    moment = kept @ kept.T
    turn = peers.rotation(weight, targets, anchors, moment, 50.0)
    identity = torch.eye(6).double()
    assert torch.allclose(turn @ turn.T, identity, atol=1e-10)
    assert torch.allclose(peers.rotation(weight, targets, anchors, moment, 0.0), identity)

    def score_of(candidate: torch.Tensor) -> torch.Tensor:
        target, anchor = (peers.orthonormal(weight @ part) for part in (targets, anchors))
        target, anchor = target @ target.T, anchor @ anchor.T
        away = (candidate @ target - identity + anchor).square().sum()
        stays = ((candidate - identity) @ weight @ kept).square().sum()
        return 50.0 * away - stays

    others = [torch.linalg.qr(turn + step).Q for step in (identity, *columns(5, 6, 6))]
    assert all(score_of(turn) >= score_of(other) for other in [identity, *others])


def test_adavd_takes_the_targets_from_tokens_that_are_like_them(columns) -> None:
    targets = columns(2, 8)
    basis = peers.orthonormal(targets.T)
    across = columns(3, 5, 8)
    across -= across @ basis @ basis.T
    assert torch.equal(peers.value_eraser(targets)(across), across)
    weak = (across + 0.1 * targets[0]).float()  # far below the threshold
    assert torch.equal(peers.value_eraser(targets)(weak), weak)

    same = targets[:1].expand(1, 3, 8)
    erased = peers.value_eraser(targets)(same)
    shift = 2 / (1 + torch.tensor(-100 * (1 - 0.93)).double().exp())
    assert torch.equal(erased[:, 0], same[:, 0])  # the start token
    assert torch.allclose(erased[:, 1:], (1 - shift) * same[:, 1:])


def test_peers_read_text_where_their_authors_read_it(demo) -> None:
    _, clip, _ = demo
    rows = clip.encode(["flag of peru", "star"]).double()
    assert torch.equal(peers.last_tokens(clip, ["flag of peru", "star"]).T[0], rows[0, 3])
    assert torch.equal(peers.last_tokens(clip, ["star"])[:, 0], clip.encode(["star"])[0, 1])
    assert peers.last_tokens(clip, []).shape == (768, 0)
    targets, anchors = peers.tails(clip, ["flag of peru"], ["star"])
    assert targets.shape == anchors.shape == (768, 74)
    assert torch.allclose(targets.T, rows[0, 3:]) and torch.allclose(anchors.T, rows[1, 1:75])
    assert peers.tails(clip, [], [])[0].shape == (768, 0)
    assert torch.equal(peers.invariant_text(clip)[:, 0], clip.encode([""])[0, 0].double())
    task = score.read_protocol()["tasks"]["objects"]
    concepts = peers.concepts_of(task)
    assert concepts.count == 10 and len(concepts.targets) == len(concepts.anchors) == 20
    assert "puppy" in concepts.targets and concepts.retained == task["preserve"] + task["prior"]


def test_oces_general_prior_is_the_mean_over_tokens_of_captions(
    demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, clip, _ = demo
    captions = ["a photo of an owl", "a cat"]
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(word for each in captions for word in (each, *"xyz")), "utf-8")
    monkeypatch.setattr(peers, "GENERIC_CAPTIONS", file)  # every fourth line counts
    states = clip.encode(captions).double()
    rows = torch.cat([states[0, :7], states[1, :4]])  # from the start token to the end token
    moment = peers.caption_moment(clip, [])
    assert torch.allclose(moment, rows.T @ rows / 11, atol=1e-4)
    of_words = peers.caption_moment(clip, ["owl"])
    assert (of_words - moment).norm() > 1 and abs(of_words.trace() / moment.trace() - 1) < 0.1


@pytest.mark.parametrize("method", score.PEERS)
def test_peers_change_prompts_of_the_concept_more(demo, method: str) -> None:
    """With nothing else listed; the first step of a picture tells."""
    model, clip, _ = demo
    task = {"kind": "object", "anchor": "star", "targets": {"dog": []}, "preserve": [], "prior": []}
    edited = peers.edit(method, model, clip, task)

    def denoised(view, prompt: str) -> torch.Tensor:
        noisy = 14.0 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        return view.denoise(noisy, torch.tensor([14.0]), clip.encode([prompt]), None, None, False)

    dog, apple = (
        (denoised(edited, prompt) - denoised(model, prompt)).norm() for prompt in ("dog", "apple")
    )
    assert dog > 1.2 * apple
    if method == "adavd":
        assert apple == (denoised(edited, "") - denoised(model, "")).norm() == 0
        assert (denoised(edited, "dog") - denoised(model, "dog")).norm() == dog  # hooks are gone
