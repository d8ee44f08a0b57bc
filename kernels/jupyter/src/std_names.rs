//! The commonest macros and paths of the standard library, the commonest methods of its commonest types, and evcxr's
//! commands.
//!
//! The standard library's sources and documentation are components that many toolchains lack; a notebook uses few of
//! its names, and uses these.

use crate::api::{Member, replace_word};

/// Paragraphs: the names of types and, behind the bar, what their parameters are called; then a member a line. `N` is
/// the number's own type. A type has the members of each paragraph that names it.
const TABLE: &str = include_str!("std_names.txt");

/// The members of a type with this name, these arguments, and this full text.
pub(crate) fn members(head: &str, arguments: &[&str], ty: &str) -> Vec<Member> {
    let element = ty.trim_matches(['[', ']']).split(';').next().unwrap_or("T").trim();
    let (head, arguments) = match ty {
        _ if ty.starts_with('[') => ("slice", &[element][..]),
        _ if ty.starts_with("impl Iterator") => ("Iterator", arguments),
        _ => (head, arguments),
    };
    paragraphs(head)
        .flat_map(|(parameters, lines)| {
            let arguments = if parameters == ["N"] { &[head] } else { arguments };
            lines.lines().filter_map(|line| member(&instantiated(line, &parameters, arguments))).collect::<Vec<_>>()
        })
        .collect()
}

/// The macros that notebooks use: their names, each with its `!`, and how they are used.
pub(crate) fn macros() -> impl Iterator<Item = (&'static str, &'static str)> {
    let usages = paragraphs("macros").flat_map(|(_, lines)| lines.lines());
    usages.filter_map(|usage| Some((&usage[..=usage.find('!')?], usage)))
}

/// evcxr's commands, each with what it does.
pub(crate) fn commands() -> impl Iterator<Item = (&'static str, &'static str)> {
    paragraphs("commands")
        .flat_map(|(_, lines)| lines.lines())
        .filter_map(|usage| Some((usage.split(' ').next()?, usage)))
}

/// The parameters' names and the lines of each paragraph that names a type.
fn paragraphs(head: &str) -> impl Iterator<Item = (Vec<&'static str>, &'static str)> {
    TABLE.split("\n\n").filter_map(move |paragraph| {
        let (header, lines) = paragraph.split_once('\n')?;
        let (types, parameters) = header.split_once(" |")?;
        types.split(' ').any(|ty| ty == head).then(|| (parameters.split_whitespace().collect(), lines))
    })
}

fn member(signature: &str) -> Option<Member> {
    let (word, rest) = signature.split_once(' ')?;
    let name = rest.split('(').next()?;
    let kind = match word {
        "fn" if signature.contains("self") => "method",
        "fn" => "function",
        "mod" => "module",
        word => word,
    };
    let ty = signature.split_once(" -> ").map_or("()", |(_, ty)| ty);
    // One letter that is still there is a parameter of the method's own.
    let is_known = !ty.split(|c: char| !c.is_alphanumeric()).any(|word| word.len() == 1);
    Some(Member::simple(name, kind, signature, if is_known { ty } else { "" }))
}

/// A type with its parameters replaced.
fn instantiated(ty: &str, parameters: &[&str], arguments: &[&str]) -> String {
    let pairs = parameters.iter().zip(arguments);
    pairs.fold(ty.to_owned(), |ty, (parameter, argument)| replace_word(&ty, parameter, argument))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_methods_type_is_that_of_the_value() {
        let ty = |head: &str, arguments: &[&str], text: &str, name: &str| {
            let found = members(head, arguments, text).into_iter().find(|member| member.name == name);
            found.unwrap_or_else(|| panic!("no {name}")).ty
        };
        assert_eq!(ty("Vec", &["u32"], "Vec<u32>", "first").as_deref(), Some("Option<&u32>"));
        assert_eq!(ty("slice", &[], "[f32; 3]", "last").as_deref(), Some("Option<&f32>"));
        assert_eq!(ty("HashMap", &["String", "Tensor"], "", "get").as_deref(), Some("Option<&Tensor>"));
        assert_eq!(ty("f32", &[], "f32", "sqrt").as_deref(), Some("f32"));
        assert_eq!(ty("Option", &["u8"], "", "map"), None);
    }
}
