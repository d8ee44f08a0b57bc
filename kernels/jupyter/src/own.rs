//! What cells define themselves, in the form of the library's index: their source says it all.

use ra_ap_syntax::ast::{self, AstNode, HasName};
use ra_ap_syntax::{SyntaxKind, SyntaxNode};

use crate::api::{Item, Member, replace_word};
use crate::scope::without_generics;
use crate::syntax;

/// Adds what a cell defines to what earlier ones did.
pub(crate) fn learn(items: &mut Vec<Item>, code: &str) {
    for item in syntax::items(code) {
        let node = item.syntax();
        if let ast::Item::Impl(block) = &item {
            let ty = block.self_ty().map(|ty| without_generics(&ty.syntax().text().to_string())).unwrap_or_default();
            if let Some(own) = items.iter_mut().find(|item| item.path == ty) {
                let added = members(node, &ty);
                own.members.retain(|member| added.iter().all(|new| new.name != member.name));
                own.members.extend(added);
            }
        } else if let (Some(path), Some(kind)) = (name(node), kind(&item)) {
            items.retain(|known| known.path != path);
            let (signature, docs, ty, members) = (head(node), docs(node), ty(node), members(node, &path));
            items.push(Item { path, kind: kind.to_owned(), signature, docs, ty, members, ..Item::default() });
        }
    }
}

/// An item's kind in the words of the index.
fn kind(item: &ast::Item) -> Option<&'static str> {
    Some(match item {
        ast::Item::Struct(_) => "struct",
        ast::Item::Enum(_) => "enum",
        ast::Item::Union(_) => "union",
        ast::Item::Trait(_) => "trait",
        ast::Item::Fn(_) => "function",
        ast::Item::Const(_) | ast::Item::Static(_) => "constant",
        ast::Item::TypeAlias(_) => "type",
        ast::Item::Module(_) => "module",
        ast::Item::MacroRules(_) => "macro",
        _ => return None,
    })
}

fn name(node: &SyntaxNode) -> Option<String> {
    Some(ast::AnyHasName::cast(node.clone())?.name()?.text().to_string())
}

/// Fields, variants and functions of a type, a trait or an `impl`.
fn members(of: &SyntaxNode, owner: &str) -> Vec<Member> {
    let direct = of.descendants().filter(|node| node.parent().and_then(|list| list.parent()).as_ref() == Some(of));
    let member = |node: SyntaxNode| {
        let takes_self = || node.descendants().any(|node| ast::SelfParam::can_cast(node.kind()));
        let kind = match node.kind() {
            SyntaxKind::RECORD_FIELD => "field",
            SyntaxKind::VARIANT => "variant",
            SyntaxKind::CONST => "constant",
            SyntaxKind::FN if takes_self() => "method",
            SyntaxKind::FN => "function",
            _ => return None,
        };
        let ty = replace_word(&ty(&node).unwrap_or_default(), "Self", owner);
        Some(Member { docs: docs(&node), ..Member::simple(&name(&node)?, kind, &head(&node), &ty) })
    };
    direct.filter_map(member).collect()
}

/// A field's type, or what a function returns.
fn ty(node: &SyntaxNode) -> Option<String> {
    let mut types =
        node.children().map(|child| ast::Type::cast(child.clone()).or_else(|| ast::RetType::cast(child)?.ty()));
    types.find_map(|ty| Some(ty?.syntax().text().to_string()))
}

/// A definition without its documentation, attributes and body.
fn head(node: &SyntaxNode) -> String {
    let parts =
        node.children_with_tokens().filter(|part| !matches!(part.kind(), SyntaxKind::ATTR | SyntaxKind::COMMENT));
    let is_body = |kind| {
        let is_list =
            [SyntaxKind::RECORD_FIELD_LIST, SyntaxKind::VARIANT_LIST, SyntaxKind::ASSOC_ITEM_LIST].contains(&kind);
        is_list || [SyntaxKind::BLOCK_EXPR, SyntaxKind::ITEM_LIST, SyntaxKind::TOKEN_TREE].contains(&kind)
    };
    let head: String = parts.take_while(|part| !is_body(part.kind())).map(|part| part.to_string()).collect();
    head.trim().trim_end_matches(';').to_owned()
}

fn docs(node: &SyntaxNode) -> String {
    let comments = node.children_with_tokens().filter(|part| part.kind() == SyntaxKind::COMMENT);
    let lines = comments.filter_map(|comment| Some(comment.to_string().strip_prefix("///")?.trim().to_owned()));
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cells_source_tells_its_types() {
        let mut items = Vec::new();
        learn(
            &mut items,
            "/// A run.\n#[derive(Debug)]\npub struct Run { pub loss: f64, steps: Vec<u8> }\nfn best(n: u8) -> Run { todo!() }",
        );
        learn(
            &mut items,
            "impl Run {\n    fn new() -> Self { todo!() }\n    fn last(&self) -> f64 { self.loss }\n}\nenum Way { Up(u8), Down }",
        );
        let [run, best, way] = &items[..] else { panic!("{items:?}") };
        assert_eq!((run.signature.as_str(), run.docs.as_str()), ("pub struct Run", "A run."));
        let of = |item: &Item| item.members.iter().map(|m| format!("{} {}", m.kind, m.signature)).collect::<Vec<_>>();
        assert_eq!(
            of(run),
            [
                "field pub loss: f64",
                "field steps: Vec<u8>",
                "function fn new() -> Self",
                "method fn last(&self) -> f64"
            ]
        );
        assert_eq!(run.member("new").and_then(|new| new.ty.clone()).as_deref(), Some("Run"));
        assert_eq!((best.signature.as_str(), best.ty.as_deref()), ("fn best(n: u8) -> Run", Some("Run")));
        assert_eq!(of(way), ["variant Up(u8)", "variant Down"]);
        learn(&mut items, "struct Run;");
        assert_eq!((items.len(), items[2].members.len()), (3, 0));
    }
}
