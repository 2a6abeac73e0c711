"""Keys that people have in their stores: none may change without a version that is raised, or a reason in docs/decisions.md.

One cell of every kind of method, and one evaluation of every kind of evaluator, of the embedded model. A key that changes here
means that finished work of every user is done again.
"""

from __future__ import annotations

import pytest

from harness.config.grid import load_sweep
from harness.core.cell import (
    ActivationScheme,
    Cell,
    Method,
    Model,
    Override,
    Part,
    Scheme,
    WeightScheme,
    _execution,
    freeze,
    quantize_key,
    score_key,
)

CALIBRATED = ("calibration=demo", "calibration.samples=8", "calibration.length=64")

QUANTIZE_KEYS = {  # method, scheme -> quantize_key of the demo model's cell
    ("none", "full"): "68b46dabd219914456353c21631884685318c654728cbe9232477fb8c3757ff2",
    ("rtn", "w4g32"): "72ce9830d8117b7097d3aa3f9e6d1a9cdcb9897ec9e45a2688a6ac2217093405",
    ("gptq", "w3g32"): "ec2ec20bbd3018750e2bdb5d0030917bd7525ad005d1bae1247a33d72c8e949d",
    ("awq", "w4g32sym"): "e942eefcf7e06f4f6168ce836e4ea448567ed8836a82610429b1682a9f64baf5",
    ("quip", "w2"): "50c88dfa18ae589c17a20971c75e8362ff4b9521982248741cec44fffce41b7e",
    ("spqr", "w3g32"): "d3c7b38750ec09f28aa79b9722389e2a66cc11c2cac7f5d7b585292b0652d47e",
    ("billm", "w1.1g32"): "c1a4bf315ee7d48d4bd3269605752ef99de1b76b65074e0cb0f2df933036e760",
    ("omniquant", "w4g32"): "84299ae51eff57927ae652d055071a25bb00bcdf65788c14b8f4efbbacf81bbf",
    ("smoothquant", "w8a8"): "f3e55acb3096ab0ca51db2e19e3c5fb60b5480832c09f290602cd6753d0326b9",
    ("bi_smoothing", "w8a8"): "42220d3dc44cf1a7797a39ba9dacf94abbc800ecf4cd837e23c4a3f2801a1146",
    (
        "llm_int8",
        "w8a8_llm_int8",
    ): "e0f247250deb88a6ede517feb36acb0c25dbc2700033254e670617c81bfe020c",
    (
        "activation_only",
        "w16kv4",
    ): "9add2e570839e90ff1d4e8a2c229916f09a1c530f04bbe0049678438e6d48aff",
    (
        "quarot",
        "w4a4kv4_quarot",
    ): "540e10bcabda89ea23c1a3d0e2fa44f22b178a5c2017df22d401cf454d9974fd",
    ("spinquant", "w4a4"): "66671ea6b198d67afa09f96679527728b4ef814c06b0c8444c5d6d6cdac3c167",
    ("qlora", "nf4g32"): "3ca8f63e73f916ca2f84f42a77bb87c3fc8da19bacc59cfd5508ca473f1990f0",
    ("peqa", "w4g32"): "0c680df2939ebde5e28479b18a382346c0dd8bc6b699277b0eaf0cf3ca59e6df",
    ("nf4", "nf4g64_double"): "ad963977e4f48e4d4afa4df9eca79f738225059c33d0f1624976f3a43f4f2d40",
    ("squeezellm", "w3"): "065fed4ad847734413b5aaac89da069e9659456c7f83fa08dbb0bccf7024a2f3",
    ("vptq", "w2"): "bc4e207c7270a6c408d88547de37e97c7fe55f9b6ec225af3f34e251adaa3357",
}

SCORE_KEYS = {  # evaluation -> score_key of the demo model, GPTQ, w4g32a8kv4
    "demo_perplexity": "1601932b86f349df0a02ec6c2ede004724a0d6883b3ee21a7a2d90c3eb1f277e",
    "tinystories": "3a5fdd707074c6f8a4b5376b43ce4a449f525d47c363f71143fd8d6c2a7a14d9",
    "demo_divergence": "2082e38367fffc7f53c697a67bb815e56c52571220e905d5d56f679554dfcd95",
    "demo_efficiency": "fa2df0798937b18fa795da4b52bedddfecae5fc1cde6cf9372a7f9b19d7b1f04",
    "demo_facts": "cbae48238b5258e4856f03e386f6460ded39704531ba4681c0bd606b08af605e",
    "demo_copy": "8bcc506e0a10264f1c0a55ea280f98f719a6929cd123d5e20409d1d6cf77de57",
    "tinystories_cloze": "30d85bb08733ba7867e5c3ca1c582d2256d46c3432003703fc3d76bcfb80bdbd",
    "arc_easy": "098671b577e77c063aff4058dc3cb4145b20e6cd943fc068f5fcd0c0a95c108e",
    "mmlu": "9134e63c1a02dd0bc41ff0e244a1bca3b71461799337fd0f7457a0aa88587e6c",
    "winogrande": "523efb4daa6d3b0b8a72ad11e07b9d0bdf329168d33d9ee758076b6c94fbe307",
    "gsm8k_substring": "7f1352df728c5f8a828e1a36ae8490a5d8e8fb8b68b965b05808fd671054d60f",
    "bbq": "5f0a2de8efc915f4ec256b3d65985d5b40811f0a80722fcfc45b6f7fb48f1143",
    "snli_yesnomaybe": "2d66045f5ab7014477ce07f5079deb1446ffa94b93357069bf57756c939842f0",
    "humaneval": "b4427d17a0ee3046ad7bfd06d0202a36ed2eaa17e0b9955601a146fcef318d2a",
    "followbench": "d9990cadf5195a3d9d6ef0c484d9e7581df103007429bd449f3eef2af632a897",
    "wikitext2": "2a3dd72cca47b2ca03e206dfca3e2081c15f03e5f737bfcc0db10c350b67f5b8",
    "lambada_openai": "df446514db56fb8cfe3409459c4dc7353b5a3f83f608df3f7399a048d6f29ffe",
    "hellaswag": "de046a8fefff43a90464ffd6a1851517ec17417a0f0ed022a6eb3a0f32a3b97a",
}


@pytest.mark.parametrize("method,scheme", QUANTIZE_KEYS)
def test_checkpoints_keep_their_keys(method: str, scheme: str) -> None:
    axes = ["model=demo", f"method={method}", f"scheme={scheme}", "baseline=false"]
    (cell,) = load_sweep(None, [*axes, *CALIBRATED]).cells
    assert quantize_key(cell) == QUANTIZE_KEYS[method, scheme]


@pytest.mark.parametrize("name", SCORE_KEYS)
def test_scores_keep_their_keys(name: str) -> None:
    axes = [
        "model=demo",
        "method=gptq",
        "scheme=w4g32a8kv4",
        "baseline=false",
        f"evaluations={name}",
    ]
    (cell,) = load_sweep(None, [*axes, *CALIBRATED]).cells
    (evaluation,) = cell.evaluations
    assert score_key(cell, evaluation) == SCORE_KEYS[name]


def test_only_cells_with_outliers_have_the_new_rule_in_their_identity() -> None:
    """Codes beside outliers are computed in float32 since rule 2; their checkpoints, and all other cells, keep their keys."""
    outliers = ActivationScheme(outlier_threshold=6.0)
    weight = WeightScheme("int", 8, -1, symmetric=True)

    def cell(activation: ActivationScheme | None, *overrides: Override) -> Cell:
        method = Method("llm_int8", rounding=Part("llm_int8"))
        scheme = Scheme("s", weight, activation, overrides=overrides)
        return Cell(Model("m", "m", digest="m"), method, scheme)

    below = Override(("down_proj",), activation=freeze({"outlier_threshold": 6.0}))
    for new in (cell(outliers), cell(ActivationScheme(), below)):
        assert _execution(new.scheme)["activation"]["outlier_rule"] == 2
        assert quantize_key(new) == quantize_key(cell(None))
    other = ActivationScheme(outlier_threshold=6.0, grid="compressed")
    for same in (cell(None), cell(ActivationScheme()), cell(other)):
        assert "outlier_rule" not in (_execution(same.scheme)["activation"] or {})
