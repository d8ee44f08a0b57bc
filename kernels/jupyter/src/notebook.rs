//! Notebook files: nbformat 4 in, nbformat 4.5 out.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

use crate::files;
use crate::outputs::Output;

/// A cell with this tag must fail; nbclient knows the same tag.
const RAISES_EXCEPTION: &str = "raises-exception";
/// A cell with one of these tags is not executed, and keeps its outputs; nbclient and nbmake know the second.
const SKIP: [&str; 2] = ["skip", "skip-execution"];

#[derive(Clone, PartialEq)]
pub struct Notebook {
    json: Value,
}

impl Notebook {
    pub fn read(path: &Path) -> Result<Notebook> {
        let shown = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("cannot read the notebook {shown}"))?;
        let json: Value = serde_json::from_str(&text)
            .with_context(|| format!("{shown} is not a notebook: a notebook is JSON, as Jupyter saves it (.ipynb)"))?;
        Notebook::from_json(json, &shown.to_string())
    }

    /// `shown` is what messages call it.
    pub fn from_json(mut json: Value, shown: &str) -> Result<Notebook> {
        match json["nbformat"].as_u64() {
            Some(4) => {}
            Some(old) if old < 4 => bail!(
                "{shown} is in notebook format {old}, and format 4 is needed\n\
                 remedy: jupyter nbconvert --to notebook --nbformat 4 --inplace {shown}"
            ),
            Some(new) => bail!("{shown} is in notebook format {new}, and only format 4 is known"),
            None => bail!("{shown} is not a notebook: it has no \"nbformat\" number"),
        }
        let language = json["metadata"]["kernelspec"]["language"].as_str();
        let language = language.or(json["metadata"]["language_info"]["name"].as_str()).unwrap_or("rust");
        if !language.eq_ignore_ascii_case("rust") {
            bail!("{shown} is a notebook in {language}, and only Rust is run here");
        }
        let Some(cells) = json["cells"].as_array_mut() else { bail!("{shown} has no list of \"cells\"") };
        let mut ids: HashSet<String> = cells.iter().filter_map(|cell| Some(cell["id"].as_str()?.to_owned())).collect();
        for (i, cell) in cells.iter_mut().enumerate() {
            let is_cell = cell.is_object() && (cell["source"].is_string() || cell["source"].is_array());
            if !is_cell || !cell["cell_type"].is_string() {
                bail!("{shown}: cells[{i}] is no cell: it needs a \"cell_type\" and a \"source\"");
            }
            // Format 4.5 wants an id a cell; older notebooks have none.
            if !cell["id"].is_string() {
                cell["id"] = json!((i..).map(|n| format!("cell-{n}")).find(|id| ids.insert(id.clone())));
            }
        }
        let minor = json["nbformat_minor"].as_u64().unwrap_or(0).max(5);
        json["nbformat_minor"] = json!(minor);
        Ok(Notebook { json })
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let mut bytes = Vec::new();
        let indent = serde_json::ser::PrettyFormatter::with_indent(b" ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, indent);
        self.json.serialize(&mut serializer)?;
        bytes.push(b'\n');
        files::write(path, &bytes).with_context(|| format!("cannot write the notebook {}", path.display()))
    }

    fn cells(&self) -> &[Value] {
        self.json["cells"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Positions of the code cells that hold code.
    pub fn code_cells(&self) -> Vec<usize> {
        let cells = self.cells().iter().enumerate();
        let code = cells.filter(|(_, cell)| cell["cell_type"] == "code");
        code.map(|(i, _)| i).filter(|i| !self.source(*i).trim().is_empty()).collect()
    }

    pub fn source(&self, cell: usize) -> String {
        match &self.cells()[cell]["source"] {
            Value::String(text) => text.clone(),
            lines => lines.as_array().into_iter().flatten().filter_map(Value::as_str).collect(),
        }
    }

    pub fn must_fail(&self, cell: usize) -> bool {
        self.has_tag(cell, RAISES_EXCEPTION)
    }

    pub fn is_skipped(&self, cell: usize) -> bool {
        SKIP.iter().any(|tag| self.has_tag(cell, tag))
    }

    pub fn has_tag(&self, cell: usize, tag: &str) -> bool {
        let tags = self.cell_metadata(cell)["tags"].as_array();
        tags.is_some_and(|tags| tags.iter().any(|other| other == tag))
    }

    pub fn cell_metadata(&self, cell: usize) -> &Value {
        &self.cells()[cell]["metadata"]
    }

    pub fn metadata(&self) -> &Value {
        &self.json["metadata"]
    }

    pub fn outputs(&self, cell: usize) -> &[Value] {
        self.cells()[cell]["outputs"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Forgets all outputs, so that none outlives the code that made it. Cells that are not executed keep theirs.
    pub fn clear_outputs(&mut self) {
        for i in 0..self.cells().len() {
            if self.cells()[i]["cell_type"] == "code" && !self.is_skipped(i) {
                self.json["cells"][i]["outputs"] = json!([]);
                self.json["cells"][i]["execution_count"] = Value::Null;
            }
        }
    }

    /// Takes outputs as nbformat has them.
    pub fn set_outputs(&mut self, cell: usize, count: usize, outputs: Vec<Value>) {
        self.json["cells"][cell]["outputs"] = Value::Array(outputs);
        self.set_count(cell, count);
    }

    pub fn set_source(&mut self, cell: usize, source: &str) {
        self.json["cells"][cell]["source"] = lines(source);
    }

    /// Changes what a cell shows that was executed before.
    pub fn replace_outputs(&mut self, cell: usize, outputs: Vec<Value>) {
        self.json["cells"][cell]["outputs"] = Value::Array(outputs);
    }

    /// Numbers a cell, and its result, by when it was executed.
    pub fn set_count(&mut self, cell: usize, count: usize) {
        let cell = &mut self.json["cells"][cell];
        cell["execution_count"] = json!(count);
        for output in cell["outputs"].as_array_mut().into_iter().flatten() {
            if output["output_type"] == "execute_result" {
                output["execution_count"] = json!(count);
            }
        }
    }
}

/// An output as nbformat has it.
pub fn output(of: &Output, count: usize) -> Value {
    let (kind, fields) = of.to_json(count, lines);
    let kind = [("output_type".to_owned(), json!(kind))];
    kind.into_iter().chain(fields.as_object().cloned().into_iter().flatten()).collect()
}

/// Text as Jupyter stores it: a list of lines, which makes for readable differences.
fn lines(text: &str) -> Value {
    json!(text.split_inclusive('\n').collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Notebook> {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(&file, text)?;
        Notebook::read(file.path())
    }

    fn refused(text: &str, why: &str) {
        let error = read(text).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(error.contains(why), "{error:?} does not say {why:?}");
    }

    #[test]
    fn refuses_what_is_no_notebook_and_says_why() {
        refused("print(1)", "a notebook is JSON");
        refused("{}", "no \"nbformat\" number");
        refused(r#"{"nbformat": 3, "worksheets": []}"#, "--nbformat 4");
        refused(r#"{"nbformat": 4}"#, "no list of \"cells\"");
        refused(r#"{"nbformat": 4, "cells": [1]}"#, "cells[0] is no cell");
        let python = r#"{"nbformat": 4, "metadata": {"kernelspec": {"language": "python"}}, "cells": []}"#;
        refused(python, "a notebook in python");
        assert!(
            Notebook::read(Path::new("/nowhere.ipynb")).is_err_and(|e| format!("{e:#}").contains("/nowhere.ipynb"))
        );
    }

    #[test]
    fn no_two_cells_get_one_id() -> Result<()> {
        let cell = |id: &str| format!(r#"{{"cell_type": "code", "source": "1"{id}}}"#);
        let cells = [cell(r#", "id": "cell-1""#), cell(""), cell(r#", "id": "cell-2""#), cell("")].join(", ");
        let notebook = read(&format!(r#"{{"nbformat": 4, "cells": [{cells}]}}"#))?;
        let ids: Vec<&str> = notebook.cells().iter().filter_map(|cell| cell["id"].as_str()).collect();
        assert_eq!(ids, ["cell-1", "cell-3", "cell-2", "cell-4"]);
        Ok(())
    }

    #[test]
    fn writes_what_jupyter_reads() -> Result<()> {
        let cell = r#"{"cell_type": "code", "metadata": {}, "source": ["let a = 1;\n", "a"], "outputs": [{"old": 1}]}"#;
        let mut notebook = read(&format!(r#"{{"nbformat": 4, "nbformat_minor": 2, "cells": [{cell}]}}"#))?;
        assert_eq!(notebook.source(0), "let a = 1;\na");
        notebook.clear_outputs();
        let data = vec![("text/plain".into(), "1\n2".into())];
        let result = Output::Display { data, is_result: true, id: None, metadata: json!({}) };
        let stream = Output::Stream { name: "stdout", text: "诗\n".into() };
        notebook.set_outputs(0, 7, vec![output(&stream, 7), output(&result, 7)]);
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("new/out.ipynb");
        notebook.write(&path)?;
        let text = fs::read_to_string(&path)?;
        assert!(text.contains("诗") && text.ends_with("}\n"));
        let json: Value = serde_json::from_str(&text)?;
        assert_eq!(json["nbformat_minor"], 5);
        assert_eq!(json["cells"][0]["id"], "cell-0");
        assert_eq!(json["cells"][0]["outputs"][0]["text"], json!(["诗\n"]));
        let expected = json!({ "output_type": "execute_result", "execution_count": 7,
                               "data": { "text/plain": ["1\n", "2"] }, "metadata": {} });
        assert_eq!(json["cells"][0]["outputs"][1], expected);
        Ok(())
    }
}
