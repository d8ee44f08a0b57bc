//! What many enums and option structs need and Rust does not write by itself.

/// Gives the values of an enum their names, as Hugging Face's files and arguments spell them.
///
/// ```ignore
/// named!(PaddingSide { Left => "left", Right => "right" });
/// // Read from text, too: what the text is and the remedy for one that is no name; more than one name a value.
/// named!(Optim: "optim", "use \"paged_adamw_32bit\"" { AdamW8bit => "adamw_8bit" | "adamw_bnb_8bit" });
/// ```
macro_rules! named {
    ($type:ident { $($value:ident => $name:literal $(| $other:literal)*),+ $(,)? }) => {
        #[allow(dead_code)] // not every enum is read
        impl $type {
            /// Every value, in the order in which messages list them.
            pub const ALL: [Self; [$(stringify!($value)),+].len()] = [$(Self::$value),+];

            /// The name in Hugging Face's files and arguments.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$value => $name),+ }
            }

            /// The value of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name $(| $other)* => Some(Self::$value),)+ _ => None }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
    ($type:ident: $what:literal, $remedy:literal { $($names:tt)+ }) => {
        $crate::names::named!($type { $($names)+ });

        impl std::str::FromStr for $type {
            type Err = $crate::error::Error;

            fn from_str(name: &str) -> Result<Self, Self::Err> {
                let supported = Self::ALL.map(Self::as_str);
                Self::from_name(name).ok_or_else(|| $crate::error::Error::unsupported($what, name, supported, $remedy))
            }
        }
    };
}

/// A struct of options whose fields stand beside their defaults: `pub r: usize = 8,`.
macro_rules! with_defaults {
    ($(#[$about:meta])* pub struct $type:ident {
        $($(#[$about_field:meta])* pub $field:ident: $of:ty = $default:expr,)+
    }) => {
        $(#[$about])*
        pub struct $type {
            $($(#[$about_field])* pub $field: $of,)+
        }

        impl Default for $type {
            fn default() -> Self {
                Self { $($field: $default,)+ }
            }
        }
    };
}

/// `Debug` that prints what `Display` prints: a notebook shows `Debug` forms, and a reader should not have to decode them.
macro_rules! debug_as_display {
    ($($type:ty),+) => {$(
        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }
    )+};
}

pub(crate) use {debug_as_display, named, with_defaults};

#[cfg(test)]
mod tests {
    use crate::error::{Error, Result};

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Side {
        Left,
        Right,
    }

    named!(Side: "side", "use \"left\"" { Left => "left" | "l", Right => "right" });

    #[test]
    fn values_are_written_and_read_by_their_names() -> Result<()> {
        assert_eq!(Side::ALL.map(|side| side.to_string()), ["left", "right"]);
        assert_eq!(serde_json::json!(Side::Right), "right");
        assert_eq!(("left".parse::<Side>()?, "l".parse::<Side>()?), (Side::Left, Side::Left));
        let error = "up".parse::<Side>().unwrap_err();
        assert!(matches!(&error, Error::Unsupported { supported, .. } if *supported == ["left", "right"]), "{error}");
        Ok(())
    }
}
