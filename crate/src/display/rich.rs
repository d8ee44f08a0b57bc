//! Values that a notebook shows as more than text.

use std::{fmt, fs, path::Path};

use crate::{
    error::{Error, Result},
    safe_file::write_atomically,
};

/// A picture. At the end of a cell it is drawn; printed, it is its SVG source.
#[derive(Clone, PartialEq, Eq)]
pub struct Svg {
    source: String,
    text: String,
}

impl Svg {
    /// `text` says in words what the picture shows, for places that cannot draw it.
    pub fn new(source: impl Into<String>, text: impl Into<String>) -> Self {
        Self { source: source.into(), text: text.into() }
    }

    /// The SVG document.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Writes the SVG file, making its folder if need be.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        }
        write_atomically(path, self.source.as_bytes())
    }

    /// Called by evcxr to show the value that ends a cell.
    pub fn evcxr_display(&self) {
        emit(&[("image/svg+xml", &self.source), ("text/plain", &self.text)]);
    }
}

impl fmt::Display for Svg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

impl fmt::Debug for Svg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Svg({})", self.text)
    }
}

/// A piece of HTML with the plain text that stands for it elsewhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Html {
    html: String,
    text: String,
}

impl Html {
    pub fn new(html: impl Into<String>, text: impl Into<String>) -> Self {
        Self { html: html.into(), text: text.into() }
    }

    /// The HTML source.
    pub fn html(&self) -> &str {
        &self.html
    }

    /// Called by evcxr to show the value that ends a cell.
    pub fn evcxr_display(&self) {
        emit(&[("text/html", &self.html), ("text/plain", &self.text)]);
    }
}

impl fmt::Display for Html {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Html {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Gives a notebook one output in several forms, `(mime type, content)`; it shows the
/// richest that it can. The markers are evcxr's protocol on stdout.
pub fn emit(forms: &[(&str, &str)]) {
    for (mime, content) in forms {
        super::line(&format!("EVCXR_BEGIN_CONTENT {mime}\n{content}\nEVCXR_END_CONTENT"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_saved_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let svg = Svg::new("<svg/>", "a picture");
        let path = folder.path().join("plots/loss.svg");
        svg.save(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "<svg/>");
        assert_eq!(fs::read_dir(folder.path().join("plots")).unwrap().count(), 1, "no temporary file stays");
        let error = svg.save(path.join("inside-a-file.svg")).unwrap_err();
        assert!(error.to_string().contains("loss.svg"), "{error}");
    }

    #[test]
    fn printed_forms() {
        let svg = Svg::new("<svg/>", "a picture");
        assert_eq!((svg.to_string(), format!("{svg:?}")), ("<svg/>".into(), "Svg(a picture)".into()));
        let html = Html::new("<b>1</b>", "1");
        assert_eq!((html.to_string(), format!("{html:?}"), html.html()), ("1".into(), "1".into(), "<b>1</b>"));
    }
}
