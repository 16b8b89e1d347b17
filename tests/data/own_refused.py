"""Own data that is refused, each with the sentence that says why."""

from __future__ import annotations

import gzip
import json

from renee_ray.data.sources.own import SAMPLE_ROWS

from .own import arrow, damaged, immense, lines, npz, pecos
from .sources import IDS, NAMES, TEXT, TEXTS, files, refused, rows, typed

OWN_REFUSED = {
    "bag-of-words": refused(
        files(**{"train.txt": lines("2 3 2", "0,1 0:1.0 2:0.5", "1 1:1.0")}),
        r"train\.txt holds a bag of words.*'raw text' archive",
    ),
    "csv-two-texts": refused(
        files(**{"train.csv": lines("title,body,tags", "a,b,c")}),
        r"train\.csv: which column of .*'title', 'body'.*holds the text\?.*text=title labels=tags ",
    ),
    "csv-two-labels": refused(
        files(**{"train.csv": lines("text,tags,topics", "a,b,c")}),
        "'tags', 'topics'.*holds the labels\\?.*text=text labels=tags ",
    ),
    "csv-both-unknown": refused(
        files(**{"train.csv": lines("name,summary,used,needs", "a,a lamp of red,yes,b;c")}),
        r"holds the text and the labels\?.*text=summary labels=needs ",
    ),
    "csv-one-column": refused(
        files(**{"train.csv": lines("name", "a")}), "no column can hold labels"
    ),
    "csv-usual-names": refused(  # an author's name has a comma, and is in Latin-1
        files(**{"train.csv": b'title,body,author,tags,topics\na,b c,"\xc9, e",d,e;f\n'}),
        "holds the text and the labels.*text=body labels=topics ",
    ),
    "csv-two-separators": refused(
        files(**{"train.csv": lines("text;tags", "a;b,c|d")}), r"'\|' or ','.*separator=none"
    ),
    "csv-brackets": refused(
        files(**{"train.csv": lines("text;tags", "a;['b', 'c']")}), "brackets.*JSON lines"
    ),
    "csv-some-brackets": refused(
        files(**{"train.csv": lines("text;tags", "a;unknown", "a;['b', 'c']", "a;{'b'}")}),
        r"brackets, as \"\['b', 'c'\]",
    ),
    "csv-and-parquet": refused(
        files(**{"train.csv": lines("text,labels", "a,b"), "train": rows()}),
        r"two training sets, .*train\.parquet and .*train\.csv; keep one",
    ),
    "csv-and-parquet-named": refused(
        files(**{"train.csv": lines("text,labels", "a,b"), "train": rows()}),
        "two training sets",
        text="text",
    ),
    "csv-label-ids": refused(
        files(
            **{
                "train.csv": lines("text,labels", "a,0|1"),
                "labels.csv": lines("id,text", "1,red", "0,blue"),
            }
        ),
        r"labels\.csv: row 0 has '1' in id and is label 0; give all labels in the order",
        labels="ids",
        text="text",
    ),
    "csv-label-ids-of-files": refused(  # the second file does not go on where the first ends
        files(
            **{
                "train.csv": lines("text,labels", "a,0|1"),
                "labels__a.csv": lines("id,text", "0,red", "1,blue"),
                "labels__b.csv": lines("id,text", "3,green", "4,grey"),
            }
        ),
        r"labels/b\.csv: row 0 has '3' in id and is label 2;",
        labels="ids",
        text="text",
    ),
    "jsonl-label-ids-of-files": refused(  # by their names, 10 comes before 2
        files(
            **{"train.jsonl": lines('{"text": "a", "labels": [0]}')},
            **{f"labels-{i}.jsonl": lines(f'{{"label_id": {i}, "text": "a"}}') for i in range(11)},
        ),
        r"labels-10\.jsonl: row 0 has 10 in label_id and is label 2;",
    ),
    "jsonl-label-not-utf8": refused(
        files(**{"train.jsonl": b'{"text": "a", "labels": ["b"]}\n{"labels": ["caf\xe9"]}\n'}),
        r"train\.jsonl:2: b'.*caf\\xe9.*' is not UTF-8; write the file as UTF-8",
    ),
    "tsv-quote": refused(
        files(**{"train.tsv": lines("text\tlabels", '"odd\tlamp', "red\tlamp", 'a 5"\tchair')}),
        r"train\.tsv: a field holds several lines, 'odd\\tlamp",
    ),
    **{
        f"csv-quote-{name}": refused(
            files(
                **{
                    "train.csv": lines(
                        *(
                            row.replace("|", mark)
                            for row in (
                                "id|text|labels",
                                "1|red lamp|a",
                                '2|"Odd lamp|b',
                                "3|blue lamp|c",
                                '4|"Another lamp|d',
                                "5|x|e",
                            )
                        )
                    )
                }
            ),
            r"train\.csv:5: a quote that is no field's end follows",
            text="text",
        )
        for name, mark in (("bar", "|"), ("semicolon", ";"), ("comma", ","))
    },
    "csv-quote-unread": refused(  # in a column that is not read
        files(**{"train.csv": lines("text,labels,note", 'a,b,"odd', "c,d,e", 'f,g,"x" y')}),
        r"train\.csv:4: a quote",
    ),
    "csv-quote-to-the-end": refused(
        files(**{"train.csv": lines("text,labels", 'a,"b', "c,d")}), r"train\.csv:3: a quote"
    ),
    "arrow-missing-of-one": refused(
        files(**{f"data-0000{i}-of-00003.arrow": arrow(rows(), 1)[0] for i in (0, 2)}),
        r"data-\*\.arrow: of the 3 files .* 2 are there",
    ),
    "arrow-missing": refused(
        files(**{"train__data-00001-of-00002.arrow": b"a"}), "of the 2 files .* 1 are there"
    ),
    "csv-no-column": refused(
        files(**{"train.csv": lines("a,b", "a,b")}), "no column 'c'; it has .'a', 'b'", text="c"
    ),
    "csv-ragged": refused(
        files(**{"train.csv": lines("text,tags", "a,b", "a,b,c")}), r"train\.csv.*2 columns, got 3"
    ),
    "csv-no-id": refused(
        files(**{"train.csv": lines("text,tags", "a,1", "b,x")}), "no id.*'x'", labels="ids"
    ),
    "csv-utf16": refused(
        files(**{"train.csv": "text,tags\na,b\n".encode("utf-16")}), "UTF-16; save it as UTF-8"
    ),
    "csv-empty": refused(files(**{"train.csv": b""}), r"train\.csv"),
    "csv-late-ids": refused(
        files(**{"train.csv": lines("text,n", *["a,7"] * (SAMPLE_ROWS + 1), "b,3 5")}),
        "n has '3 5', and the first rows have no separator",
        labels="n",
        text="text",
    ),
    "csv-test-of-another-kind": refused(
        files(**{"train.csv": lines("text,tags", "a,b"), "test.parquet": b""}),
        r"test\.parquet is there, and the training set is .*train\.csv; write both in one format",
    ),
    "jsonl-filter-labels": refused(
        files(**{"train.jsonl": b'{"text": "a", "labels": ["b"], "filter_labels": ["c"]}\n'}),
        "has a column 'filter_labels'",
    ),
    "jsonl-ids-and-names": refused(
        files(
            **{
                "train.jsonl": b'{"text": "a", "labels": [1]}\n',
                "labels.csv": lines("label,text", "1,two", "0,zero"),
            }
        ),
        r"labels\.csv has a column 'label' and the points have ids",
    ),
    "pecos-names": refused(
        files(**pecos(IDS, TEXTS, "trn"), **{"Y.txt": lines("title", *NAMES, "more")}),
        r"Y\.txt has \d+ lines and .*Y\.trn\.npz has 4 columns",
    ),
    "jsonl-mixed": refused(
        files(
            **{"train.jsonl": lines('{"text": "a", "labels": ["a"]}', '{"labels": 1, "text": ""}')}
        ),
        "labels is not of one kind",
        labels="labels",
    ),
    "jsonl-mixed-guessed": refused(
        files(
            **{
                "train.jsonl": lines(
                    '{"id": 1, "text": "a", "label": "x"}', '{"id": 2, "text": "b", "label": ["y"]}'
                )
            }
        ),
        "label is not of one kind",
    ),
    "jsonl-float": refused(
        files(**{"train.jsonl": lines('{"text": "a", "label": 1.0}')}),
        "label is of type double; it must be strings, integers",
    ),
    "jsonl-two-kinds": refused(
        files(
            **{
                "train__a.jsonl": lines('{"text": "a", "label": "x"}'),
                "train__b.jsonl": lines('{"text": "b", "label": 1}'),
            }
        ),
        r"a\.jsonl and in .*b\.jsonl are list of string and list of integer",
    ),
    "jsonl-later-file": refused(
        files(
            **{
                "train__a.jsonl": lines('{"text": "a", "labels": [1]}'),
                "train__b.jsonl": lines('{"text": "b", "labels": [0.5]}'),
            }
        ),
        r"src/train/b\.jsonl has a column 'labels' of type",
    ),
    "jsonl-empty-test": refused(
        files(**{"train.jsonl": lines('{"text": "a", "labels": [1]}'), "test.jsonl": b""}),
        r"test\.jsonl has no row",
    ),
    "csv-header-test": refused(
        files(**{"train.csv": lines("text,tags", "a,b"), "test.csv": lines("text,tags")}),
        r"test\.csv has no row",
    ),
    "csv-only-test": refused(
        files(**{"test.csv": lines("text,tags", "a,b")}), "no training set.*'test.csv' is there"
    ),
    "csv-late-separator": refused(
        files(**{"train.csv": lines("text,tags", *["a,b"] * SAMPLE_ROWS, "a,b|c")}),
        r"'b\|c', and the first rows have no separator; give separator=",
    ),
    "csv-label-columns": refused(
        files(**{"train.csv": lines("text,tags", "a,b"), "labels.csv": lines("id,name", "0,b")}),
        r"labels\.csv has the columns .'id', 'name'.*'label'",
    ),
    "jsonl-label-kinds": refused(
        files(
            **{
                "train.jsonl": lines('{"text": "a", "labels": ["x"]}'),
                "labels.jsonl": lines('{"label": "x"}', '{"label": ["y"]}'),
            }
        ),
        r"labels\.jsonl: label is not of one kind",
    ),
    "csv-bad-gzip": refused(
        files(**{"train.csv.gz": gzip.compress(lines("text,tags", "a,b"))[:-9]}),
        r"train\.csv\.gz is not a complete gzip file",
    ),
    "csv-no-gzip": refused(
        files(**{"train.csv.gz": lines("text,tags", "a,b")}), "is not a complete gzip file"
    ),
    "jsonl-separator": refused(
        files(**{"train.jsonl": lines('{"text": "a", "labels": ["b|c"]}')}),
        "leave separator= out",
        separator="|",
    ),
    "arrow-offsets": refused(files(**{"train__data-0.arrow": damaged()}), "data-0.arrow cannot be"),
    "arrow-body": refused(files(**{"train__data-0.arrow": immense()}), "data-0.arrow cannot be"),
    "arrow-truncated": refused(
        files(**{"train__data-0.arrow": arrow(rows())[0][:-400]}), "data-0.arrow cannot be read"
    ),
    "pecos-offsets": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": npz([0, 9_999_999, 2])}),
        r"Y\.trn\.npz is no sparse matrix",
    ),
    "pecos-truncated": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": npz([0, 1, 2])[:-30]}), "no sparse"
    ),
    "pecos-missing": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": npz(None)}), "no sparse matrix"
    ),
    "pecos-no-npz": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": b"1 2"}), "no sparse matrix"
    ),
    "pecos-named": refused(
        files(**pecos(IDS, TEXTS, "trn")), "leave text=, labels= and separator= out", separator="|"
    ),
    "parquet-separator": refused(typed(), "separator=.*labels=COLUMN", separator="|"),
    "jsonl-array": refused(
        files(**{"train.json": b'[{"text": "a", "labels": [1]}]'}), "write one a line"
    ),
    "jsonl-range": refused(
        files(
            **{
                "train.jsonl": lines('{"text": "a", "labels": [0]}', '{"labels": [0, 4]}'),
                "labels.jsonl": lines(*(json.dumps({"text": name}) for name in NAMES)),
            }
        ),
        r"train\.jsonl: row 1 has 4 in labels, which is none of the 4",
    ),
    "pecos-rows": refused(
        files(**pecos(IDS, TEXTS, "trn") | {"X.trn.txt": lines("a", "b")}), "2 lines .* 6 rows"
    ),
    "repository-named": refused(files(**TEXT), "leave text=, labels= and sep", text="title"),
    "repository-separator": refused(files(**TEXT), "leave text=, labels= and sep", separator=";"),
    "all-held-out": refused(files(**TEXT), "hold out all", validation=0.9, test=0.1),
}
