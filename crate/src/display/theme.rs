//! How HTML outputs look: styles that read on a light and on a dark page, with and without
//! JupyterLab's own colours. Inline, because a front end takes scripts and style sheets away.

/// Text in the front end's own font and colour.
pub(crate) const TEXT: &str = "font-family:var(--jp-ui-font-family,system-ui,sans-serif);\
                               font-size:var(--jp-ui-font-size1,13px);line-height:1.5";
/// What is there to be looked up, not read.
pub(crate) const FAINT: &str = "opacity:.65";
pub(crate) const TABLE: &str = "border-collapse:collapse;color:inherit;background:transparent;margin:0";
pub(crate) const CELL: &str = "border:1px solid rgba(128,128,128,.35);padding:.25em .6em;text-align:left;\
                               vertical-align:top;max-width:32em;white-space:pre-wrap;overflow-wrap:anywhere";
/// A cell with a number.
pub(crate) const NUMBER: &str = "border:1px solid rgba(128,128,128,.35);padding:.25em .6em;text-align:right;\
                                 vertical-align:top;white-space:nowrap;font-variant-numeric:tabular-nums";
/// The empty part of a bar.
pub(crate) const TRACK: &str = "background:rgba(128,128,128,.25);border-radius:4px;overflow:hidden";

/// What the training changes: learned tokens, LoRA's modules.
pub(crate) const LEARNED: &str = "background:rgba(46,160,67,.28);box-shadow:inset 0 -2px rgba(46,160,67,.9);\
                                  border-radius:.2em";
pub(crate) const BLUE: &str = "var(--jp-brand-color1,#1976d2)";
pub(crate) const GREEN: &str = "var(--jp-success-color1,#388e3c)";
pub(crate) const ORANGE: &str = "var(--jp-warn-color1,#f57c00)";
pub(crate) const RED: &str = "var(--jp-error-color1,#d32f2f)";
