//! What stands on a module, by name; one of them is active.

/// Adapters of one module. Cloning shares them where `T` does.
#[derive(Clone)]
pub struct Adapters<T> {
    /// By name, in the order in which they were added.
    all: Vec<(String, T)>,
    /// The one that is applied and learns.
    active: Option<usize>,
}

impl<T> Default for Adapters<T> {
    fn default() -> Self {
        Self { all: Vec::new(), active: None }
    }
}

impl<T> Adapters<T> {
    /// One more, which is not active yet.
    pub fn push(&mut self, name: &str, adapter: T) {
        self.all.push((name.into(), adapter));
    }

    /// Makes the one of that name active; none, if there is none of that name.
    pub fn activate(&mut self, name: Option<&str>) {
        self.active = self.all.iter().position(|(n, _)| Some(n.as_str()) == name);
    }

    pub fn all(&self) -> &[(String, T)] {
        &self.all
    }

    pub fn active(&self) -> Option<&T> {
        self.active.and_then(|i| self.all.get(i)).map(|(_, adapter)| adapter)
    }
}
