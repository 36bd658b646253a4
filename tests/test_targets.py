"""Deployment targets: the files that ship, and what a user's own file is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holov_export.errors import StorageError, UnknownNameError, UsageError
from holov_export.policies import Frozen
from holov_export.targets import (
    BuildFlags,
    EngineTarget,
    PowerMode,
    Rates,
    Source,
    TargetProfile,
    VersionRange,
    list_targets,
    target_from_name,
    target_names,
    target_schema_text,
)
from holov_export.versions import version_from_text

ENGINES = Path(__file__).resolve().parent.parent / "engines"
ORIN = "jetson-agx-orin-64gb"
SHIPPED = {
    *("a100-80gb", "b200", "h100", "h200", "l4", "l40s", "rtx-4090", "jetson-agx-thor"),
    *("jetson-agx-orin-32gb", ORIN, f"{ORIN}-jetpack5", f"{ORIN}-jetpack6.0", f"{ORIN}-jetpack7.2"),
    *("jetson-orin-nano-8gb", "jetson-orin-nx-16gb"),
}


TARGETS = list_targets()


def board(tmp_path: Path, change: str = "", to: str = "") -> Path:
    """A user's own file: the Orin's with one passage replaced."""
    text = (ENGINES / f"{ORIN}.toml").read_text(encoding="utf-8")
    assert change in text
    path = tmp_path / "my-board.toml"
    path.write_text(text.replace(change, to, 1), encoding="utf-8")
    return path


def raw(**changes: Any) -> dict[str, Any]:
    return {**target_from_name(ORIN).model_dump(), **changes}


class TestShipped:
    def test_all_of_them_are_there(self) -> None:
        assert set(target_names()) == SHIPPED

    @pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
    def test_every_figure_has_a_source(self, target: EngineTarget) -> None:
        said = " ".join(source.what for source in target.sources)
        fields = {"memory_gb", "bandwidth_gbs", "rates", "tensorrt", "cuda", "reserved_gb", "multiprocessors"}
        if target.kind == "jetson":
            fields |= {"power_modes", "jetpack", "python"}
        assert not {field for field in fields if field not in said}

    @pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
    def test_a_file_is_called_like_its_target_and_names_its_schema(self, target: EngineTarget) -> None:
        text = (ENGINES / f"{target.name}.toml").read_text(encoding="utf-8")
        assert text.startswith("#:schema ./target.schema.json\n")
        assert f'\nname = "{target.name}"\n' in text

    @pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
    def test_rates_are_dense(self, target: EngineTarget) -> None:
        """Halving a type doubles the dense rate of tensor cores, so one sparse figure among them stands out."""
        rates = target.rates
        # a GeForce accumulates float16 in float32 at half rate, but int8 in int32 at full rate
        step = 4 if target.kind == "workstation" else 2
        assert rates.int8 is None or rates.int8 == pytest.approx(step * rates.fp16, rel=0.02)
        assert rates.fp8 is None or rates.fp8 == pytest.approx(2 * rates.fp16, rel=0.02)
        assert rates.fp4 is None or rates.fp4 == pytest.approx(4 * rates.fp16, rel=0.02)
        assert rates.bf16 in (None, rates.fp16)
        assert rates.fp32 < rates.fp16

    @pytest.mark.parametrize(
        ("name", "dla", "advertised"),
        [(ORIN, 105, 275), ("jetson-agx-orin-32gb", 92, 200), ("jetson-orin-nano-8gb", 0, 67)],
    )
    def test_orins_add_up_to_their_advertised_tops(self, name: str, dla: int, advertised: int) -> None:
        dense = target_from_name(name).rates.int8
        assert dense is not None
        assert 2 * dense + dla == pytest.approx(advertised, rel=0.01)

    def test_the_schema_is_up_to_date(self) -> None:
        assert (ENGINES / "target.schema.json").read_text(encoding="utf-8") == target_schema_text()

    def test_the_same_board_differs_by_its_software_only(self) -> None:
        first, *others = [target_from_name(name) for name in sorted(SHIPPED) if name.startswith(ORIN)]
        software = {"name", "title", "tensorrt", "cuda", "jetpack", "python", "precisions", "sources", "notes", "rates"}
        for other in others:
            assert other.model_dump(exclude=software) == first.model_dump(exclude=software)
            assert other.rates.fp16 == first.rates.fp16
        assert [other.lowest_tensorrt for other in others] == [(8, 5, 2), (8, 6, 2), (10, 13)]


class TestVersions:
    @pytest.mark.parametrize(
        ("text", "version"), [("10.3.0.30", (10, 3, 0, 30)), ("8.6.2", (8, 6, 2)), ("10.13.3.9.post1", (10, 13, 3, 9))]
    )
    def test_versions_parse(self, text: str, version: tuple[int, ...]) -> None:
        assert version_from_text(text) == version

    def test_a_word_is_no_version(self) -> None:
        with pytest.raises(UsageError, match="'latest' is no version number"):
            version_from_text("latest")

    @pytest.mark.parametrize(
        ("low", "high", "version", "inside"),
        [
            ("10.3", "10.3", "10.3.0.30", True),
            ("10.3", "10.3", "10.4", False),
            ("10.3", "10.3", "10", False),
            ("8.6", "11.4", "8.6", True),
            ("8.6", "11.4", "8.5.3.1", False),
            ("8.6", "11.4", "11.4.1.9", True),
            ("8.6", "11.4", "11.5", False),
            ("8.5.2", "8.5.2", "8.5.2.2", True),
            ("8.5.2", "8.5.2", "8.5", False),
            ("12", "13", "13.2", True),
            ("9.0", "10.0", "9", True),
        ],
    )
    def test_ranges_hold_their_last_release(self, low: str, high: str, version: str, inside: bool) -> None:
        assert VersionRange(min=low, max=high).holds(version) is inside

    def test_a_range_reads_aloud(self) -> None:
        assert str(VersionRange(min="10.3", max="10.3")) == "10.3"
        assert str(VersionRange(min="10.13", max="11.4")) == "10.13 to 11.4"


class TestProfiles:
    @given(tokens=st.integers(1, 5000))
    def test_every_model_gets_an_ordered_profile(self, tokens: int) -> None:
        for target in TARGETS:
            for profile in target.profiles_for(tokens):
                low, usual, high = profile.budget
                assert 1 <= low <= usual <= high == tokens
                assert 1 <= profile.batch.min <= profile.batch.opt <= profile.batch.max

    def test_shares_and_counts(self, tmp_path: Path) -> None:
        path = board(
            tmp_path, 'budget = { min = 1, opt = "1/9", max = "all" }', 'budget = { min = 64, opt = "1/9", max = 600 }'
        )
        profile = target_from_name(str(path)).profiles_for
        assert profile(576)[0].budget == (64, 64, 576)
        assert profile(2880)[0].budget == (64, 320, 600)
        assert profile(144)[0].budget == (64, 64, 144)  # a ninth is below the minimum
        assert profile(40)[0].budget == (40, 40, 40)  # and so is the whole model

    def test_a_model_without_tokens_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one token"):
            target_from_name(ORIN).profiles_for(0)


class TestFacts:
    def test_what_a_target_says_of_itself(self) -> None:
        target = target_from_name("jetson-agx-thor")
        assert target.compute_capability == "11.0"
        assert target_from_name(ORIN).compute_capability == "8.7"
        assert target.rate("int8") is None
        assert not target.supports("int8")
        assert target.rate("int4") == target.rates.fp16
        assert target_from_name("jetson-orin-nano-8gb").usable_bytes == 6 * 2**30

    def test_targets_can_be_keys(self) -> None:
        assert {target_from_name(ORIN): 1}[target_from_name(ORIN)] == 1

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"precisions": ("fp16", "fp16")}, "a precision is named twice"),
            ({"precisions": ("fp8",)}, "rates lacks fp8, which precisions names"),
            ({"reserved_gb": 64}, "leaves nothing of memory_gb"),
            ({"jetpack": None}, "jetpack belongs to targets of the kind jetson"),
            ({"kind": "datacenter"}, "jetpack belongs to targets of the kind jetson"),
            ({"flags": {"hardware_compatibility": "ampere_plus"}}, "ampere_plus does not exist on a Jetson"),
            ({"profiles": [raw()["profiles"][0]] * 2}, "two profiles have the same name"),
            (
                {"sources": [{"what": "x", "checked": "read", "date": "2026-01-01"}]},
                "a source needs a url or a document",
            ),
            ({"name": "../x"}, "String should match pattern"),
            ({"profiles": []}, "at least 1 item"),
        ],
    )
    def test_contradictions_are_refused(self, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            EngineTarget.model_validate(raw(**changes))


class TestReading:
    def test_a_file_of_ones_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = board(tmp_path, f'name = "{ORIN}"', 'name = "my-board"')
        assert target_from_name(str(path)).name == "my-board"
        monkeypatch.chdir(tmp_path)
        assert target_from_name("./my-board.toml") == target_from_name("my-board.toml") == target_from_name(str(path))
        monkeypatch.setenv("HOME", str(tmp_path))
        assert target_from_name("~/my-board.toml").name == "my-board"

    def test_an_unknown_name_names_close_ones(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown target 'jetson-agx-orin'") as caught:
            target_from_name("jetson-agx-orin")
        assert "Did you mean: jetson-agx-orin-32gb, jetson-agx-orin-64gb, " in caught.value.hint
        with pytest.raises(UnknownNameError, match="unknown target 'orin-nano'") as caught:
            target_from_name("orin-nano")
        assert "jetson-orin-nano-8gb" in caught.value.hint
        with pytest.raises(UnknownNameError) as caught:
            target_from_name("zzz")
        assert "Did you mean" not in caught.value.hint
        assert "./board.toml" in caught.value.hint

    @pytest.mark.parametrize("name", ["missing.toml", "my-board.toml/deeper.toml"])
    def test_a_file_that_is_not_there(self, tmp_path: Path, name: str) -> None:
        board(tmp_path)
        with pytest.raises(UnknownNameError, match="there is no target file"):
            target_from_name(str(tmp_path / name))
        with pytest.raises(UnknownNameError, match="there is no target file '~nobody-of-that-name"):
            target_from_name("~nobody-of-that-name/x.toml")

    def test_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").mkdir()
        with pytest.raises(UsageError, match="is a folder, not a target file"):
            target_from_name(str(tmp_path / "x.toml"))

    def test_a_file_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> NoReturn:
            raise PermissionError(13, "Permission denied")

        path = board(tmp_path)
        monkeypatch.setattr(Path, "read_text", refuse)
        with pytest.raises(StorageError, match=r"cannot read '.*my-board.toml': Permission denied"):
            target_from_name(str(path))

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_bytes(b'name = "\xff\xfe"')
        with pytest.raises(UsageError, match="is not UTF-8 text"):
            target_from_name(str(tmp_path / "x.toml"))

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        path = board(tmp_path)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert target_from_name(str(path)).name == ORIN

    def test_nesting_without_an_end(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text(f"x = {'[' * 100_000}", encoding="utf-8")
        with pytest.raises(UsageError, match=r"x.toml' is not TOML: "):
            target_from_name(str(tmp_path / "x.toml"))

    def test_text_that_is_no_toml_names_its_line(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text('name = "x"\ntitle = \n', encoding="utf-8")
        with pytest.raises(UsageError, match=r"x.toml' is not TOML: .*line 2"):
            target_from_name(str(tmp_path / "x.toml"))

    @pytest.mark.parametrize(
        ("change", "to", "key", "said"),
        [
            ("sm = 87", 'sm = "many"', "sm", "valid integer"),
            ("sm = 87", 'sm = 87\ncolour = "red"', "colour", "unknown key"),
            ("fp16 = 42.6", "fp16 = -1", "rates.fp16", "greater than 0"),
            ('min = "10.3"', 'min = "10.4"', "tensorrt", "min 10.4 is above max 10.3"),
            ('max = "12.6"', 'max = "twelve"', "cuda.max", "match pattern"),
            ('precisions = ["fp16"', 'precisions = ["fp17"', "precisions.1", "Input should be"),
            (
                "batch = { min = 1, opt = 4, max = 8 }",
                "batch = { min = 1, opt = 9, max = 8 }",
                "profiles.2.batch",
                "<=",
            ),
            (
                'name = "several"\nbatch = { min = 1, opt = 4, max = 8 }\nbudget = { min = 1, opt = "1/9"',
                'name = "several"\nbatch = { min = 1, opt = 4, max = 8 }\nbudget = { min = "1/3", opt = "1/9"',
                "profiles.2.budget",
                "not in order",
            ),
            ('opt = "1/9"', 'opt = "a few"', "profiles.1.budget.opt", 'a share such as "1/9", or "all"'),
            ('opt = "1/9"', "opt = 0", "profiles.1.budget.opt", "a positive number of tokens"),
            ('opt = "1/9"', "opt = true", "profiles.1.budget.opt", "a positive number of tokens"),
            ("workspace_mb = 4096\n", "", "workspace_mb", "missing"),
            ("memory_gb = 64", "memory_gb = inf", "memory_gb", "less than or equal to 10000"),
            ("memory_gb = 64", "memory_gb = 1e308", "memory_gb", "less than or equal to 10000"),
            ("reserved_gb = 4", "reserved_gb = nan", "reserved_gb", "greater than or equal to 0"),
            ("bandwidth_gbs = 204.8", "bandwidth_gbs = inf", "bandwidth_gbs", "less than or equal to 100000"),
            ("bandwidth_gbs = 204.8", "bandwidth_gbs = 0.2048", "bandwidth_gbs", "greater than or equal to 1"),
            ("fp16 = 42.6", "fp16 = inf", "rates.fp16", "less than or equal to 100000"),
            ("multiprocessors = 16", "multiprocessors = 10000000", "multiprocessors", "less than or equal to 10000"),
            ("workspace_mb = 4096", "workspace_mb = 4_294_967_296", "workspace_mb", "less than or equal to 1000000"),
            (
                "batch = { min = 1, opt = 4, max = 8 }",
                "batch = { min = 1, opt = 4, max = 8_000_000_000 }",
                "profiles.2.batch.max",
                "less than or equal to 2147483647",
            ),
        ],
    )
    def test_a_wrong_value_is_named_with_key_and_line(
        self, tmp_path: Path, change: str, to: str, key: str, said: str
    ) -> None:
        path = board(tmp_path, change, to)
        with pytest.raises(UsageError) as caught:
            target_from_name(str(path))
        message = caught.value.message
        assert "my-board.toml' is no usable target" in message
        assert said in message
        if said == "missing":  # nowhere in the file
            assert f"{key}: missing" in message
            return
        line = int(message.split(f"{key} (line ")[1].split(")")[0])
        # the line is the key's own, or that of the table that it stands in
        shown = path.read_text(encoding="utf-8").splitlines()[line - 1]
        assert any(part in shown for part in key.split(".") if not part.isdigit())
        assert to.splitlines()[-1] in "\n".join(path.read_text(encoding="utf-8").splitlines()[line - 1 : line + 2])

    def test_a_list_is_not_called_empty_because_its_entry_is_wrong(self, tmp_path: Path) -> None:
        only = 'budget = { min = 1, opt = "1/9", max = "all" }'
        example = TestReadme.README.split("```toml\n")[1].split("```")[0]
        path = tmp_path / "my-board.toml"
        path.write_text(example.replace(only, only.replace('"all"', "0")), encoding="utf-8")
        with pytest.raises(UsageError, match=r"profiles\.1\.budget\.max") as caught:
            target_from_name(str(path))
        assert "at least 1 item" not in caught.value.message
        path.write_text(example.split("[[profiles]]")[0], encoding="utf-8")
        with pytest.raises(UsageError, match="profiles: missing"):
            target_from_name(str(path))


class TestReadme:
    README = (ENGINES / "README.md").read_text(encoding="utf-8")

    def test_its_example_is_a_target(self, tmp_path: Path) -> None:
        path = tmp_path / "my-board.toml"
        path.write_text(self.README.split("```toml\n")[1].split("```")[0], encoding="utf-8")
        assert target_from_name(str(path)).profiles_for(576)[0].budget == (1, 64, 576)

    @pytest.mark.parametrize("model", [EngineTarget, Rates, PowerMode, TargetProfile, BuildFlags, Source])
    def test_it_names_every_field(self, model: type[Frozen]) -> None:
        assert not [name for name in model.model_fields if not re.search(rf"[`\[ ]{name}[`\] ]", self.README)]
