//! Variables, from cell to cell.

use crate::{Run, kept};

/// All cells share one candle: ids differ, and a gradient through tensors of several cells is right. With a copy of
/// candle in each cell both variables would have id 1, and both gradients would be their sum.
#[test]
fn tensors_of_different_cells() {
    Run::of(&kept("tensors.ipynb"), &[]).assert_success();
}

/// A failed cell costs nothing that it did not move away.
#[test]
fn survive_a_failed_cell() {
    Run::of(&kept("survival.ipynb"), &[]).assert_success();
}

#[test]
fn need_no_type_in_writing() {
    let run = Run::cells(&[
        "use std::collections::HashMap;\nlet mut counts = HashMap::new();\ncounts.insert(\"a\".to_string(), 1u8);",
        "let (n, Some(first)) = (counts.len(), counts.get(\"a\").copied()) else { panic!() };",
        "let table: Vec<_> = counts.iter().map(|(k, v)| (k.clone(), *v)).collect();\nlet ratio = 0.5;",
        "struct Mine { table: Vec<(String, u8)> }\nlet mine = Mine { table };",
        "counts.insert(\"b\".into(), first);\nprintln!(\"{n} {} {:?} {ratio}\", counts.len(), mine.table);",
    ]);
    run.assert_success();
    assert_eq!(run.stream(4, "stdout"), "1 2 [(\"a\", 1)] 0.5\n");
}

#[test]
fn take_a_new_type() {
    let run = Run::cells(&["let x = 1;", "let x = format!(\"{x} as text\");", "x"]);
    run.assert_success();
    assert_eq!(run.outputs(2)[0]["data"]["text/plain"][0], "\"1 as text\"");
}

/// A cell that only calls the library is compiled without optimising; others are optimised. What cells define and keep
/// is the same to both.
#[test]
fn are_the_same_to_optimised_cells_and_plain_ones() {
    // Fails where the mark of a plain cell is, for that is a file.
    let is_marked = "println!(\"{}\", LoraConfig::default().save_pretrained(&mark).is_err());";
    // In a session with much code cells keep what was compiled, each level by itself.
    for much in ["", &"// much\n".repeat(2000)] {
        let run = Run::cells(&[
            &format!("fn code() {{\n{much}}}\nstruct Mine(u8);\nlet mine = Mine(7);"),
            "use qlora_nb::prelude::*;\nlet mark = format!(\"{}/plain\", std::env::var(\"EVCXR_TMPDIR\").unwrap());",
            is_marked,
            "println!(\"{}\", mine.0);",
            &format!("(|| {{ {is_marked} }})();"),
        ]);
        run.assert_success();
        assert_eq!([2, 3, 4].map(|cell| run.stream(cell, "stdout")), ["true\n", "7\n", "false\n"]);
    }
}
