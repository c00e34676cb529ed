"""README.ja.md says what README.md says; it and docs/flags.ja.md keep to one word for one thing."""

import json
import re
import runpy
import zlib
from collections import Counter

from conftest import ROOT

import pytest
from test_documents import prose, slugs

# English term: (its one rendering, others in use that do not occur)
GLOSSARY = {
    "embedding": ("埋め込み", "埋込|エンベディング|分散表現"),
    "hard negative": ("ハードネガティブ", "難しい負例|困難な負例|ハード負例|ハードネガ(?!ティブ)"),
    "gradient accumulation": ("勾配累積", "勾配蓄積|勾配の(?:累積|蓄積)|勾配アキュムレーション"),
    "quantise": ("量子化", "定量化|クオンタイズ|クォンタイズ"),
    "merge": ("マージ(?!ン)", "統合|併合|結合"),
    "base": ("ベースモデル", "基盤モデル|元のモデル|基底モデル|ベース(?!モデル)"),
    "adapter": ("アダプタ", "アダプター"),
    "fine-tune": ("ファインチューニング", "微調整|ファインチューン|ファイン・チューニング"),
    "training": ("学習", "訓練|トレーニング"),
    "loss": ("損失", "(?<!ク)ロス"),
    "learning rate": ("学習率", "学習係数|ラーニングレート"),
    "gradient": ("勾配", "傾斜|グラディエント"),
    "weights": ("重み", "ウェイト|ウエイト|加重"),
    "checkpoint": ("チェックポイント", "中間保存|保存点|チェック・ポイント"),
    "dev set": ("評価データ", "検証データ|検証セット|開発セット|評価セット|devセット"),
    "query": ("クエリ", "クエリー|問い合わせ"),
    "document": ("文書", "ドキュメント"),
    "positive": ("正例", "ポジティブ|正解例|陽性"),
    "negative": ("負例", "不正解例|陰性|(?<!ハード)ネガティブ"),
    "tokenizer": ("トークナイザ", "トークナイザー|字句解析器"),
    "chat template": ("チャットテンプレート", "会話テンプレート|対話テンプレート|チャットの雛形"),
    "prefix": ("接頭辞", "プレフィックス|プリフィックス|接頭語"),
    "preference": ("選好", "嗜好|プリファレンス"),
    "half precision": ("半精度", "ハーフプレシジョン|低精度"),
    "memory": ("メモリ", "メモリー|記憶領域"),
}
# of each section of README.md the check sum of the text that the Japanese was made from
TRANSLATED = {
    "lora-training-scripts-that-are-exact-and-say-what-they-do": "366f495b",
    "contents": "fc1e1377",
    "try-it": "edc96111",
    "your-own-pairs": "8f248f4a",
    "your-own-conversations": "f104a0d6",
    "colab": "2c80f1da",
    "the-one-idea": "c4b2fb29",
    "what-a-run-leaves-behind": "6a2603b1",
    "when-memory-is-short": "c9142987",
    "several-gpus": "cd0795e9",
    "when-something-is-odd": "bf138f39",
    "merge-and-serve": "a7bd4c0f",
    "figures": "e61ffb94",
    "where-things-live": "1e7a490a",
}
ENGLISH = (ROOT / "README.md").read_text("utf-8")
JAPANESE = (ROOT / "README.ja.md").read_text("utf-8")
FLAGS = (ROOT / "docs/flags.ja.md").read_text("utf-8")
TEXTS = {"README.ja.md": JAPANESE, "docs/flags.ja.md": FLAGS}
KANA_OR_KANJI = "[ぁ-んァ-ヶー一-龠々]"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
POLITE = re.compile(r"(?:です|ます|ません|でした|ました|ください|ますか|ませんか)$")


def sections(text):
    """Return [(level of the heading, the section without it)]; no code may begin a line with "# "."""
    parts = re.split(r"^(#+) .*$", text, flags=re.M)
    return list(zip(map(len, parts[1::2]), parts[2::2], strict=True))


def blocks(text):
    """Return [(language, code without comments)] of a document."""
    return [
        (language, re.sub(r"(?:^|\s+)# .*$", "", code, flags=re.M))
        for language, code in BLOCK.findall(text)
    ]


def spans(text):
    """Return how often each span of code stands in the prose."""
    return Counter(re.findall(r"`([^`]+)`", prose(text)))


def numbers(text):
    """Return how often each number stands in a text, without code and links' targets."""
    shown = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text).replace(",", "")
    return Counter(re.findall(r"(?<![\w@.-])\d+(?:\.\d+)?", shown))


def assert_same_numbers(english, japanese):
    """The Japanese has the numbers of the English, and digits for its words, up to ten."""
    assert numbers(english) <= numbers(japanese)
    added = numbers(japanese) - numbers(english)
    assert [number for number in added if not re.fullmatch(r"\d|10", number)] == []


def links(text, document):
    """Return how often each target is linked; a heading of the document itself by its place."""
    found = Counter()
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        is_own = target.startswith("#")
        found[slugs(document).index(target[1:]) if is_own else target] += 1
    return found


def tables(text):
    """Return [rows of cells] of the tables of a document."""
    found = re.findall(r"(?:^\|.*\n)+", prose(text), re.M)
    return [[row.strip("|").split(" | ") for row in table.splitlines()] for table in found]


def sentences(text):
    """Return the Japanese sentences of a document up to their 。, without code and addresses."""
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose(text))
    shown = re.sub(r"`[^`]*`", "", shown)
    pieces = re.split(r"。|\n\s*\n|\n(?=\s*(?:[-|#]|\d+\.) ?)| \| ", shown)
    return [" ".join(piece.split()) for piece in pieces if piece.strip(" |\n")]


# ---------------------------------------------------------------- the same as the English


def test_every_section_stands_in_both_in_the_same_order():
    assert [level for level, _ in sections(JAPANESE)] == [level for level, _ in sections(ENGLISH)]
    assert len(sections(ENGLISH)) > 12


def test_blocks_of_code_are_equal_but_for_comments():
    assert blocks(JAPANESE) == blocks(ENGLISH)
    assert len(blocks(ENGLISH)) > 9


def test_tables_hold_the_same_numbers_code_and_links():
    assert len(tables(ENGLISH)) == 4
    for english, japanese in zip(tables(ENGLISH), tables(JAPANESE), strict=True):
        assert len(japanese) == len(english)
        for row, in_ja in zip(english, japanese, strict=True):
            assert len(in_ja) == len(row), in_ja
            row, in_ja = " | ".join(row), " | ".join(in_ja)
            assert spans(row) == spans(in_ja)
            assert_same_numbers(row, in_ja)
            added = Counter({"docs/flags.ja.md": "docs/flags.ja.md" in in_ja})
            assert links(row, ENGLISH) == links(in_ja, JAPANESE) - added


@pytest.mark.parametrize("place", range(len(sections(ENGLISH))))
def test_what_a_section_names_stands_in_both(place):
    [english, japanese] = [sections(text)[place][1] for text in (ENGLISH, JAPANESE)]
    assert spans(english) <= spans(japanese)
    assert_same_numbers(prose(english), prose(japanese))
    english_links = links(english, ENGLISH)
    english_links.pop("README.ja.md", None)
    assert english_links <= links(japanese, JAPANESE)


def test_a_changed_section_of_the_english_is_looked_at():
    current = {
        slug: f"{zlib.crc32(text.encode()):08x}"
        for slug, (_, text) in zip(slugs(ENGLISH), sections(ENGLISH), strict=True)
    }
    changed = [slug for slug in current if TRANSLATED.get(slug) != current[slug]]
    assert changed == [], f"bring README.ja.md after README.md, then write here: {current}"
    assert list(TRANSLATED) == list(current)


# ---------------------------------------------------------------- the language


@pytest.mark.parametrize("term", GLOSSARY)
def test_a_term_has_one_rendering(term):
    rendering, others = GLOSSARY[term]
    assert re.search(rendering, JAPANESE + FLAGS)
    assert len(GLOSSARY) == 25
    for name, text in TEXTS.items():
        assert re.findall(rf".{{0,20}}(?:{others}).{{0,20}}", text) == [], name


@pytest.mark.parametrize("name", TEXTS)
def test_sentences_are_short_and_latin_letters_half_width(name):
    found = sentences(TEXTS[name])
    assert len(found) > 100
    assert [sentence for sentence in found if len(sentence) > 80] == []
    assert re.findall("[！-～｡-ﾟ]", TEXTS[name]) == []
    side = rf"{KANA_OR_KANJI}[A-Za-z0-9`]|[A-Za-z0-9`]{KANA_OR_KANJI}"
    shown = re.sub("`[^`]*`", "`", prose(TEXTS[name]))
    assert re.findall(rf".{{0,9}}(?:{side}).{{0,9}}", shown) == []


def test_sentences_of_the_readme_are_polite():
    shown = re.sub(r"^\|.*$", "", prose(JAPANESE), flags=re.M)
    ends = re.findall(r"([^。\n]*)。", shown)
    assert len(ends) > 60
    assert [end for end in ends if not POLITE.search(end)] == []


# ---------------------------------------------------------------- the flags


def test_a_changed_text_of_a_flag_asks_for_its_japanese():
    made = runpy.run_path(str(ROOT / "docs/make_flags.py"))
    japanese = json.loads((ROOT / "docs/flags.ja.json").read_text("utf-8"))
    cells = ["`--seed`", "integer ≥ 7", "at noon", "of rows, adapters and more"]
    stale = made["stale_texts"]({"a.py": {"data": [cells]}}, japanese)
    assert stale[:3] == ["a.py --seed: of rows, adapters and more", "integer ≥ 7", "at noon"]
    assert "--lr: no flag" in stale
    for english, text in japanese["flags"].values():
        assert english and re.search(KANA_OR_KANJI, text), english
        assert spans(english) <= spans(text), english
        assert numbers(english) <= numbers(text), english
