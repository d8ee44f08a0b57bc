//! A failed cell costs no variable: not even one that it was about to replace.
//!
//! In `let model = get_peft_model(&model, &config)?;` evcxr takes the old `model` out of its store, and puts back what
//! the cell ends with: nothing, if it fails. So a cell that binds a name anew first leaves a clone of the old value
//! in the store (what a notebook holds is a cheap handle), and after a failure that clone becomes the variable
//! again. A type that cannot be cloned is lost, as in any evcxr.

/// Items that every cell sees: whether a type is Clone is decided by which of two methods fits first.
pub const PRELUDE: &str = "mod qlora_nb_keep {
    pub struct Keep<'a, T>(pub &'a T);
    pub trait CanClone<T> { fn copy(&self) -> Option<T>; }
    impl<T: Clone> CanClone<T> for Keep<'_, T> { fn copy(&self) -> Option<T> { Some(self.0.clone()) } }
    pub trait CannotClone<T> { fn copy(&self) -> Option<T>; }
    impl<T> CannotClone<T> for &Keep<'_, T> { fn copy(&self) -> Option<T> { None } }
}";
/// What [`PRELUDE`] defines.
pub const PRELUDE_DEFINES: &str = "qlora_nb_keep";

/// A variable that a cell binds anew, and the type that it has had so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Replaced {
    pub name: String,
    pub ty: String,
}

impl Replaced {
    /// Leaves a clone in the store. A statement for the beginning of the cell.
    pub fn keep(&self) -> String {
        let Replaced { name, ty } = self;
        format!(
            "{{ use qlora_nb_keep::*; if let Some(old) = (&Keep(&{name})).copy() \
             {{ evcxr_variable_store.put_variable::<{ty}>(stringify!({name}), old); }} }} "
        )
    }

    /// Makes the clone the variable again. A cell of its own.
    pub fn restore(&self) -> String {
        let Replaced { name, ty } = self;
        format!("let {name}: {ty} = evcxr_variable_store.take_variable::<{ty}>(stringify!({name}));")
    }
}
