"""Normalisation, and the vocabulary against transformers' own tokenizer."""

import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Wav2Vec2CTCTokenizer

from flax_asr import languages
from flax_asr.errors import ConfigError, DataError, ModelError
from flax_asr.languages import writes_without_spaces
from flax_asr.text import normalizer
from flax_asr.vocabulary import Vocabulary

WRITTEN = {
    "zh-HK": ("你好，世界！ Hello (World) 第 ３ 章 𠮷野家。", "你好世界hello world第3章𠮷野家"),
    "yue": ("佢話：「唔該！」", "佢話唔該"),
    "zh-CN": ("《红楼梦》，１２３", "红楼梦123"),
    "zh-TW": ("「台灣」？ It’s", "台灣its"),
    "ja": ("ｶﾞﾝﾀﾞﾑ、ラーメン・ＯＫ！", "ガンダムラーメンok"),
    "ko": ("안녕, 하세요! ㅋㅋ", "안녕 하세요 ㅋㅋ"),
    "th": ("น้ํา กิน เเล้ว ๆ !", "น้ำกินแล้วๆ"),
    "en": ("“It’s” café… ROCK’N’ROLL — well-known", "it's café rock'n'roll well known"),
    "de": ("STRAẞE, „geht’s“?", "straße geht's"),
    "fr": ("C’est-à-dire « l’été » — oui !", "c'est-à-dire l'été oui"),
    "es": ("¿Qué? ¡Sí!", "qué sí"),
    "it": ("L’Aquila, c’è.", "l'aquila c'è"),
    "pt": ("Disse-me: “não”.", "disse-me não"),
    "ru": ("Всё э́то — что-то.", "все это что-то"),
    "sv-SE": ("Å, nej: »Är det så?»", "å nej är det så"),
    "tr": ("İSTANBUL’da IŞIK", "istanbulda ışık"),
    "ar": ("السَّلَامُ عَلَيْكُمْ؟", "السلام عليكم"),
    "eu": ("Kaixo! Joan-etorri, ñ.", "kaixo joan-etorri ñ"),
    "uk": ("П’ять — «слів»", "п'ять слів"),
    "km": ("សួស្តី! ពិភពលោក។", "សួស្តីពិភពលោក"),
}


@pytest.mark.parametrize("language", WRITTEN)
def test_each_language_is_written_its_own_way(language):
    before, after = WRITTEN[language]
    assert normalizer(language)(before) == after


@pytest.mark.parametrize(
    ("language", "before", "after"),
    [
        # Decomposed jamo are the same syllables; half-width ones are not the letters of a chat.
        ("ko", "\u1112\u1161\u11ab\u1100\u1173\u11af ㅋㅋ ＫＢＳ", "한글 ㅋㅋ kbs"),
        ("tr", "DİYARBAKIR'ın kâğıdı; IĞDIR", "diyarbakırın kâğıdı ığdır"),
        ("de", "STRASSE, Straße, GROẞ; O\u0308l", "strasse straße groß öl"),
        ("ar", "الــعــربية ﻻ أُمٌّ ٱلْحَمْدُ", "العربية لا أم الحمد"),
        ("ar", "قَالُوا\u06da هُوَ \u06d6 اللَّهُ \u0610", "قالوا هو الله"),
        ("ha", "'Yar uwa: ’ya’yan ƙasa, sana'a 'eh'", "ƴar uwa ƴaƴan ƙasa sana'a eh"),
        ("mt", "Ta' Malta, tista’ tmur 'iemes'; b'mod", "ta' malta tista' tmur iemes b'mod"),
        ("sv", "EU:s möte: kl. 12:30", "eu:s möte kl 12 30"),
        ("th", "นํ้า เเดง ๆ ฯลฯ", "น้ำแดงๆฯลฯ"),
        ("en", "the cats’ tails, ’tis O’Brien’s", "the cats tails tis o'brien's"),
        ("fr", "Aujourd’hui, « peut-être » l’œuvre", "aujourd'hui peut-être l'œuvre"),
        ("fa", "كتابِ علي؟ مي\u200cروم", "کتاب علی می\u200cروم"),
        ("he", 'שָׁלוֹם, צה״ל; צה"ל — ג׳ינס', 'שלום צה"ל צה"ל ג\'ינס'),
        ("hi", "क्\u200dया? पक्\u200cका।", "क्या पक्का"),
        ("it", "un po’ d’acqua", "un po d'acqua"),
        ("it", "E' così, PERCHE’ c'e'? Se' e l'e'r", "è così perché c'è se e l'e'r"),
        ("ru", "№ 5: дом №7", "5 дом 7"),
        ("uk", "Її№3", "її 3"),
        # One letter with two code points, of which the language has one.
        ("uk", "Мій кiт; п`ять", "мій кіт п'ять"),
        ("be", "Мiнск, сям’я", "мінск сям'я"),
        ("ro", "Şi ţara, și țara; s-a dus", "și țara și țara s-a dus"),
        ("kab", "Γer teΣwiqt, ɣer ɛli; εli aği aǧi ԑ", "ɣer teɛwiqt ɣer ɛli ɛli aǧi aǧi ɛ"),
        ("cv", "Çăltăr — Ҫӑлтӑр; ĕ ӗ ӱ ÿ ӳ", "ҫӑltӑr ҫӑлтӑр ӗ ӗ ӳ ӳ ӳ"),
        ("ba", "hәм, Һаумыһығыҙ", "һәм һаумыһығыҙ"),
        ("kk", "бiр таӊ", "бір таң"),
        ("az", "Әli, ǝl; Əli'nin", "əli əl əlinin"),
        ("vi", "Ðà Nẵng — Đà Nẵng", "đà nẵng đà nẵng"),
        ("ur", "كيا یہ کِتاب ہے؟ یه", "کیا یہ کتاب ہے یہ"),
        ("ckb", "ئه\u200cمه\u200c كوردي — ئەمە کوردی", "ئەمە کوردی ئەمە کوردی"),
        # A joiner between a letter and the mark that it combines with.
        ("bn", "র\u200d্যাব, ক\u200dি র\u200d! \u200d্", "র\u200d্যাব ক\u200dি র"),
        ("kn", "ರ\u200d್ಯಾಂಕ್", "ರ\u200d್ಯಾಂಕ್"),
        ("ml", "അവന്\u200d, അവൻ; അവര്\u200d", "അവൻ അവൻ അവർ"),
        # Letters of more than one part.
        (
            "uz",
            "Tog‘ — togʻ; o'zbek, O’zbek, ma’no, sanʼat",
            "togʻ togʻ oʻzbek oʻzbek ma'no san'at",
        ),
        ("hy", "Բարև և ինչպե՞ս", "բարև և ինչպես"),
        ("hyw", "Բարեւ եւ ինչպե՞ս", "բարեւ եւ ինչպես"),
        ("bo", "བཀྲ་ཤིས་ བདེ་ལེགས། ང་། OK «ཀ»།།", "བཀྲ་ཤིས་བདེ་ལེགས་ང་okཀ"),
        ("oc", "L’in·hèrn · des·har!", "l'in·hèrn des·har"),
        (
            "ca",
            "Paral.lel, co•legi? col•lecció inteŀligent",
            "paral·lel co legi col·lecció intel·ligent",
        ),
        ("fi", "EU:n vaa’an, linja-auto: 5", "eu:n vaa'an linja-auto 5"),
        ("tr", "i\u0307ki I\u0307ki", "iki iki"),
        ("en", "i\u0307stanbul", "istanbul"),
        ("pt", "Pôr-se-á à porta; d’água", "pôr-se-á à porta d'água"),
        ("es", "El pingüino, ¿año?", "el pingüino año"),
        ("ru", "Ёлка, всё-таки; й и\u0306", "елка все-таки й й"),
        ("eu", "'Bai', esan-ez; Ñ", "bai esan-ez ñ"),
        ("zh-CN", "我 爱 A B，《书》……", "我爱a b书"),
        ("zh-TW", "ㄅㄆㄇ　〇一二？", "ㄅㄆㄇ〇一二"),
        ("ja", "スーパー、々〜 ﾊﾟ", "スーパー々パ"),
        ("yue", "𡃁仔，３蚊！", "𡃁仔3蚊"),
    ],
)
def test_what_is_special_in_each_language_is_normalised(language, before, after):
    assert normalizer(language)(before) == after


def test_only_languages_without_a_rule_get_the_default_and_say_so():
    assert not any(normalizer(code).is_default for code in set(WRITTEN) - {"km"})
    assert normalizer("cy").is_default
    assert normalizer("nan-tw").is_default


def test_a_code_is_read_whatever_its_case_and_region():
    assert normalizer("ZH_hk") == normalizer("zh-HK")
    assert normalizer("pt-BR") == normalizer("pt")


def test_languages_without_spaces_are_known():
    assert all(writes_without_spaces(code) for code in ("zh-HK", "yue", "ja", "th", "nan-tw"))
    assert not any(writes_without_spaces(code) for code in ("ko", "en", "vi", "tr"))


pieces = st.text(max_size=6) | st.sampled_from(
    [
        "İ",
        "I",
        "ẞ",
        "´",
        "¨",
        "'",
        "-",
        "ﬁ",
        "½",
        "ำ",
        "ํา",
        "é",
        "ㅋ",
        "❤️",
        "\u200b",
        "你 好",
        "Σ",
        "ا َ",
        "র\u200d্য",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*languages.RULES, "xx", "km"]), st.lists(pieces, max_size=6).map("".join))
def test_normalising_twice_changes_nothing_more(language, text):
    once = normalizer(language)(text)
    assert normalizer(language)(once) == once


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*languages.RULES, "xx"]), st.text(max_size=30))
def test_normalised_text_has_single_spaces_and_no_control_characters(language, text):
    result = normalizer(language)(text)
    assert result == " ".join(result.split())
    assert all(
        c == " " or c.isprintable() or c in "\u200c\u200d" or not c.isascii() for c in result
    )


def test_the_old_example_deletes_all_from_exclamation_mark_to_semicolon():
    rule = normalizer("hf-4.17")
    assert rule("It's 42 (a-b)") == "its  ab"
    assert rule(
        "".join(map(chr, range(0x20, 0x7F)))
    ) == " <=>@abcdefghijklmnopqrstuvwxyz[\\]^_`" + ("abcdefghijklmnopqrstuvwxyz{|}~")
    assert rule("你好，“世界”。") == "你好，世界。"
    counts = {change.before: change.count for change in rule.report(["It's 42 (a-b)", "4"])}
    assert counts == {"'": 1, "4": 2, "2": 1, "(": 1, "-": 1, ")": 1, "I": 1}


def test_of_several_texts_to_replace_the_longest_counts_whatever_their_order():
    assert normalizer([{"replace": {"a": "x", "ab": "y", "b": "a"}}])("aab b") == "xy a"


def test_variation_selectors_of_characters_are_taken_out():
    assert normalizer("ja")("葛\U000e0100城、❤\ufe0f市") == normalizer("ja")("葛城、❤市")


def test_the_report_counts_every_place():
    changes = normalizer(["lower", {"replace": {"ab": "x"}}, {"remove": "!"}]).report(
        ["AB!", "!ab"]
    )
    found = {(change.step, change.before, change.after): change.count for change in changes}
    assert found == {
        ("lower", "A", "a"): 1,
        ("lower", "B", "b"): 1,
        ("replace", "ab", "x"): 2,
        ("remove", "!", ""): 2,
    }
    assert "EXCLAMATION MARK removed: 2" in changes[0].describe() + changes[1].describe()


def test_the_report_of_a_normal_form_names_each_character_with_what_it_combines_with():
    """Half-width letters and their marks, full-width ones in a row, letters of Hangul, accents."""
    text = "ﾊﾞﾅﾅ？３\u1112\u1161\u11abe\u0301a\u0323\u0307"
    changes = normalizer(["nfkc"]).report([text])
    assert {(change.before, change.after): change.count for change in changes} == {
        ("ﾊﾞ", "バ"): 1,
        ("ﾅ", "ナ"): 2,
        ("？", "?"): 1,
        ("３", "3"): 1,
        ("\u1112\u1161\u11ab", "한"): 1,
        ("e\u0301", "é"): 1,
        ("a\u0323\u0307", "ạ\u0307"): 1,
    }


def test_a_report_shows_invisible_characters_as_escapes():
    (change,) = normalizer([{"remove": "\x1b"}]).report(["\x1b[2J"])
    assert "\x1b" not in change.describe()


def test_a_list_extends_a_language_and_survives_a_configuration_file():
    rule = normalizer(["zh-HK", {"replace": {"好": "壞"}}])
    assert rule("你好！") == "你壞"
    again = normalizer(json.loads(json.dumps(rule.spec)))
    assert again == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert normalizer([])("Any Thing") == "Any Thing"


def test_a_list_extends_the_rule_of_languages_that_have_none():
    rule = normalizer(["default", {"remove": "x"}])
    assert rule.steps == (*normalizer("cy").steps, *normalizer([{"remove": "x"}]).steps)
    assert rule("Mae'n X, da!") == "mae'n  da"
    assert normalizer(json.loads(json.dumps(rule.spec))) == rule
    assert not rule.is_default
    with pytest.raises(ConfigError, match="no step or language 'default'"):  # which is none
        normalizer("default")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["cy", {"remove": "x"}], "no step or language 'cy'; The steps .* called 'default'"),
        (["nfd"], "did you mean 'nfc'"),
        ("nfkcc", "did you mean 'nfkc'"),
        (["lower", "strip_punctation"], "did you mean 'strip_punctuation'"),
        ("english", "no step or language 'english'"),
        ("Cantonese", "^data.language or text.normalization: there is no"),
        ([{"remove": 3}], "remove takes a string"),
        (["remove"], "remove takes a string, got None"),
        ([{"replace": {"a": 1}}], "strings to strings"),
        ([{"replace": {"": "a"}}], "strings to strings"),
        (["replace_words"], "takes a mapping"),
        ([{"remove": "a", "lower": "tr"}], "one name and its argument"),
        ([{"nfkc": "x"}], "nfkc takes no argument"),
    ],
)
def test_a_wrong_step_is_refused_with_the_nearest_name(spec, message):
    with pytest.raises(ConfigError, match=message):
        normalizer(spec)


TEXTS = ["你好 𠮷野家", "it's ok", "ab"]


def test_the_vocabulary_is_blank_unknown_delimiter_and_sorted_characters():
    vocabulary = Vocabulary.from_transcripts(["ba c", "a𠮷"])
    assert vocabulary.tokens == ("[PAD]", "[UNK]", "|", "a", "b", "c", "𠮷")
    assert (vocabulary.blank, vocabulary.unknown, vocabulary.delimiter) == (0, 1, "|")
    assert Vocabulary.from_transcripts(["ba"]).tokens == ("[PAD]", "[UNK]", "a", "b")
    assert Vocabulary.from_transcripts(["b|a"]).tokens == ("[PAD]", "[UNK]", "|", "a", "b")
    assert Vocabulary.from_transcripts(["aab"], min_count=2).tokens == ("[PAD]", "[UNK]", "a")
    with pytest.raises(DataError, match="no characters"):
        Vocabulary.from_transcripts(["", " "])


def test_the_old_layout_puts_the_specials_last_and_the_delimiter_in_the_spaces_place():
    vocabulary = Vocabulary.from_transcripts(["ba", "!"], layout="hf-4.17")
    assert vocabulary.tokens == ("|", "!", "a", "b", "[UNK]", "[PAD]", "<s>", "</s>")
    assert (vocabulary.blank, vocabulary.unknown) == (5, 4)


def collapsed(ids, blank):
    return [label for label, _ in itertools.groupby(ids) if label != blank]


def agrees_with_transformers(vocabulary, tokenizer, texts):
    assert len(tokenizer) == vocabulary.size
    assert tokenizer.pad_token_id == vocabulary.blank
    for text in texts:
        assert vocabulary.encode(text).tolist() == tokenizer(text).input_ids, text
    generator = np.random.default_rng(0)
    for _ in range(50):
        ids = generator.integers(0, vocabulary.size, size=30).repeat(2).tolist()
        # Not skip_special_tokens: transformers would drop the blanks before it joins repeats.
        assert vocabulary.decode(collapsed(ids, vocabulary.blank)) == tokenizer.decode(ids)


@pytest.mark.parametrize("layout", ["blank-first", "hf-4.17"])
@pytest.mark.parametrize("texts", [TEXTS, ["你好", "好𠮷"]], ids=["spaces", "no spaces"])
def test_a_written_vocabulary_is_the_same_in_transformers(tmp_path, layout, texts):
    vocabulary = Vocabulary.from_transcripts(texts, layout=layout)
    vocabulary.write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, Wav2Vec2CTCTokenizer)
    spaces = [] if vocabulary.delimiter is None else ["你 unknown Ж", "a  b "]
    agrees_with_transformers(vocabulary, tokenizer, [*texts, "你unЖ", *spaces])
    assert Vocabulary.from_folder(tmp_path) == vocabulary


def test_a_vocabulary_survives_json():
    vocabulary = Vocabulary.from_transcripts(TEXTS, layout="hf-4.17")
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=10), min_size=1, max_size=4))
def test_what_is_in_the_vocabulary_survives_encoding(sentences):
    texts = list(map(normalizer("xx"), sentences))
    if not any(texts):
        return
    vocabulary = Vocabulary.from_transcripts(texts)
    assert [vocabulary.decode(vocabulary.encode(text)) for text in texts] == texts


BASE_960H = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]


def write_folder(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_folder_in_the_style_of_wav2vec2_base_960h_is_read(tmp_path):
    write_folder(
        tmp_path,
        vocab={token: place for place, token in enumerate(BASE_960H)},
        tokenizer_config={
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "do_lower_case": False,
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
        },
        special_tokens_map={"pad_token": {"content": "<pad>", "lstrip": False}},
    )
    vocabulary = Vocabulary.from_folder(tmp_path)
    assert vocabulary.tokens == tuple(BASE_960H)
    agrees_with_transformers(vocabulary, AutoTokenizer.from_pretrained(tmp_path), ["HELLO WORLD'S"])
    # Capitals only: a text in small letters is read as capitals, not as unknown characters.
    assert vocabulary.encode("hello").tolist() == vocabulary.encode("HELLO").tolist()


def test_in_an_old_folder_the_map_of_special_tokens_has_the_last_word(tmp_path):
    write_folder(
        tmp_path,
        vocab={token: place for place, token in enumerate(["<pad>", "|", "a", "[UNK]", "[PAD]"])},
        tokenizer_config={
            "unk_token": "[UNK]",
            "pad_token": "<pad>",
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
        },
        special_tokens_map={"pad_token": "[PAD]", "bos_token": None, "eos_token": None},
    )
    vocabulary = Vocabulary.from_folder(tmp_path)
    assert (vocabulary.blank, vocabulary.unknown) == (4, 3)
    assert vocabulary.blank == AutoTokenizer.from_pretrained(tmp_path).pad_token_id


@pytest.mark.parametrize("added", [{}, {"<s>": 5, "</s>": 6}], ids=["", "added_tokens.json"])
def test_old_tokens_that_the_head_has_no_place_for_are_left_out(tmp_path, added):
    """Models of 2021: transformers adds the tokens to the tokenizer when it reads the folder."""
    write_folder(
        tmp_path,
        vocab={token: place for place, token in enumerate(["|", "a", "b", "[UNK]", "[PAD]"])},
        tokenizer_config={"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>"},
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"},
        added_tokens=added,
        config={"model_type": "wav2vec2", "vocab_size": 5},
    )
    vocabulary = Vocabulary.from_folder(tmp_path)
    assert vocabulary.tokens == ("|", "a", "b", "[UNK]", "[PAD]")
    assert (vocabulary.blank, vocabulary.unknown, vocabulary.bos, vocabulary.eos) == (
        4,
        3,
        None,
        None,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    ids = [1, 4, 1, 2, 2, 0, 3, 1]
    assert vocabulary.decode(collapsed(ids, 4)) == tokenizer.decode(ids)
    # A character without a place in the head is no such token.
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2", "vocab_size": 4}')
    assert Vocabulary.from_folder(tmp_path).size == 7


def test_added_tokens_of_the_old_example_are_read(tmp_path):
    write_folder(
        tmp_path,
        vocab={"|": 0, "a": 1, "b": 2, "[UNK]": 3, "[PAD]": 4},
        added_tokens={"<s>": 5, "</s>": 6},
        tokenizer_config={
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
        },
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"},
    )
    vocabulary = Vocabulary.from_folder(tmp_path)
    assert vocabulary.tokens == ("|", "a", "b", "[UNK]", "[PAD]", "<s>", "</s>")
    assert vocabulary == Vocabulary.from_transcripts(["ab"], layout="hf-4.17")
    agrees_with_transformers(vocabulary, AutoTokenizer.from_pretrained(tmp_path), ["ab a"])


def test_special_tokens_that_no_file_numbers_come_last_as_in_transformers(tmp_path):
    write_folder(
        tmp_path,
        vocab={"a": 0, "sch": 1, "<pad>": 2, "|": 3},
        tokenizer_config={"tokenizer_class": "Wav2Vec2CTCTokenizer", "do_lower_case": True},
    )
    vocabulary = Vocabulary.from_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert {token: place for place, token in enumerate(vocabulary.tokens)} == tokenizer.get_vocab()
    assert vocabulary.decode([0, 3, 1]) == "a sch"
    assert vocabulary.encode("scha").tolist() == [1, 0]


def test_a_bare_vocabulary_file_is_read(tmp_path):
    write_folder(tmp_path, vocab={"[PAD]": 0, "[UNK]": 1, "a": 2})
    vocabulary = Vocabulary.from_folder(tmp_path / "vocab.json")
    assert (vocabulary.tokens, vocabulary.blank, vocabulary.unknown) == (
        ("[PAD]", "[UNK]", "a"),
        0,
        1,
    )


def test_a_nested_vocabulary_needs_a_language(tmp_path):
    nested = {"eng": {"<pad>": 0, "<unk>": 1, "e": 2}, "fra": {"<pad>": 0, "<unk>": 1, "é": 2}}

    def read(**named):
        settings = {"bos_token": None, "eos_token": None, **named}
        write_folder(tmp_path, vocab=nested, tokenizer_config=settings)
        return Vocabulary.from_folder(tmp_path)

    with pytest.raises(ModelError, match="2 languages, and none is chosen: eng, fra"):
        read()
    assert read(target_lang="fra").tokens[2] == "é"
    with pytest.raises(ModelError, match="'deu' is not among them"):
        read(target_lang="deu")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file"),
        ({"vocab": {"[PAD]": 0, "a": 2}}, "are not 0 to 1"),
        ({"vocab": {"[PAD]": 0, "a": "1"}}, "are not 0 to 1, each once"),
        ({"vocab": ["a"]}, "holds a list"),
        ({"vocab": {"a": 0}}, "no pad_token"),
        (
            {"vocab": {"a": 0}, "tokenizer_config": {"tokenizer_class": "WhisperTokenizer"}},
            "WhisperTokenizer",
        ),
    ],
)
def test_a_folder_that_holds_no_character_vocabulary_is_refused(tmp_path, files, message):
    write_folder(tmp_path, **files)
    with pytest.raises(ModelError, match=message):
        Vocabulary.from_folder(tmp_path)


def test_what_a_vocabulary_lacks_is_counted():
    vocabulary = Vocabulary.from_transcripts(["ab"])
    assert vocabulary.lacks(["aЖ b", "Ж"]) == {"Ж": 2, " ": 1}
    assert Vocabulary.from_transcripts(["a b"]).lacks(["a b"]) == {}
    capitals = Vocabulary(("<pad>", "A", "SCH"), blank=0)
    assert capitals.only_capitals
    assert capitals.lacks(["ascha", "b"]) == {"B": 1}


def test_special_tokens_are_written_out_or_stand_for_something():
    vocabulary = Vocabulary.from_transcripts(["ab"], layout="hf-4.17")
    ids = [vocabulary.tokens.index(t) for t in ("a", "[UNK]", "[PAD]", "b", "</s>")]
    assert vocabulary.decode(ids) == "a[UNK]b</s>"
    assert vocabulary.decode(ids, special="?") == "a?b?"


def test_a_character_without_token_is_unknown_or_refused():
    vocabulary = Vocabulary.from_transcripts(["ab"])
    assert vocabulary.encode("aЖ b").tolist() == [2, 1, 1, 3]
    with pytest.raises(DataError, match="Ж"):
        Vocabulary(("<pad>", "a"), blank=0).encode("aЖ")


def test_characters_without_any_token_are_refused_with_what_to_do():
    vocabulary = Vocabulary(("[PAD]", "a"), blank=0)
    with pytest.raises(DataError, match=r"no token: 'b c'; nor .* text\.normalization"):
        vocabulary.encode("abcb")
