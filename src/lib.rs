//! gradestore
pub mod grade;
pub mod store;
