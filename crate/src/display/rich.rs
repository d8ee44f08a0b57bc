//! Values that a notebook shows as more than text.

use std::{fmt, fs, path::Path};

use super::protocol;
use crate::{
    error::{Error, Result},
    names::debug_as_display,
    safe_file::write_atomically,
};

/// One output in several forms, `(mime type, content)`, `text/plain` among them.
pub type Forms = Vec<(&'static str, String)>;

/// Shows an output in several forms in the middle of a cell; the front end takes the richest
/// that it can draw. In a terminal it is the plain text.
///
/// ```
/// use qlora_nb::display::emit;
/// emit(&[("text/html", "<b>1</b>"), ("text/plain", "1")]);
/// ```
pub fn emit<S: AsRef<str>>(forms: &[(&str, S)]) {
    if protocol::is_spoken() {
        protocol::output("display", None, forms, false);
    } else if super::in_cell() {
        emit_value(forms);
    } else {
        let text = forms.iter().find(|(mime, _)| *mime == "text/plain");
        super::line(text.map_or("", |(_, text)| text.as_ref()));
    }
}

/// Gives evcxr the forms of the value that ends a cell: what a type's `evcxr_display` calls.
pub fn emit_value<S: AsRef<str>>(forms: &[(&str, S)]) {
    for (mime, content) in forms {
        super::line(&format!("EVCXR_BEGIN_CONTENT {mime}\n{}\nEVCXR_END_CONTENT", content.as_ref()));
    }
}

/// Lets a notebook show values of a type that has a method `forms`.
macro_rules! shown_by_forms {
    ($($type:ty),+) => {$(
        impl $type {
            /// Called by evcxr to show the value that ends a cell.
            pub fn evcxr_display(&self) {
                $crate::display::emit_value(&self.forms());
            }

            /// Shows it now, in the middle of a cell; at the end of one its name is enough.
            pub fn show(&self) {
                $crate::display::emit(&self.forms());
            }
        }
    )+};
}
pub(crate) use shown_by_forms;

/// A picture. At the end of a cell it is drawn; printed, it is its SVG source.
///
/// ```
/// use qlora_nb::display::Svg;
/// let svg = Svg::new("<svg xmlns=\"http://www.w3.org/2000/svg\"/>", "nothing");
/// svg.show(); // in the middle of a cell
/// ```
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
        self.save_path(path.as_ref())
    }

    fn save_path(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        }
        write_atomically(path, self.source.as_bytes())
    }

    /// What a notebook shows.
    pub fn forms(&self) -> Forms {
        vec![("image/svg+xml", self.source.clone()), ("text/plain", self.text.clone())]
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

    /// What a notebook shows.
    pub fn forms(&self) -> Forms {
        vec![("text/html", self.html.clone()), ("text/plain", self.text.clone())]
    }
}

impl fmt::Display for Html {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

debug_as_display!(Html);
shown_by_forms!(Svg, Html);

#[cfg(test)]
mod tests {
    use super::{super::protocol::capture, *};

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

    #[test]
    fn a_display_in_mid_cell_is_one_message_and_a_value_is_evcxrs() {
        let ((), sent) = capture::messages(|| {
            Html::new("<b>1</b>", "1").show();
            Svg::new("<svg/>", "a picture").show();
            Svg::new("<svg/>", "the value of the cell").evcxr_display();
        });
        let data: Vec<_> = sent.iter().map(|message| message["data"].to_string()).collect();
        assert_eq!(
            data,
            [r#"{"text/html":"<b>1</b>","text/plain":"1"}"#, r#"{"image/svg+xml":"<svg/>","text/plain":"a picture"}"#]
        );
    }
}
